"""Records of a tokenizer beside token ids, and what only looks like one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sae.errors import DataError
from sae.text.recorded import check_recorded_tokenizer


class Tokenizer:
    name_or_path = "models/mine"


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sae_lens.json").write_text('{"tokenizer_name": "theirs"}')
    with pytest.raises(DataError, match="its token ids are of the tokenizer 'theirs', the model's is 'mine'"):
        check_recorded_tokenizer(str(tmp_path), Tokenizer(), None)
    check_recorded_tokenizer(str(tmp_path), Tokenizer(), "theirs")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("sae_lens.json", "dataset_info.json", "a.parquet", "tokenizer.json"):
        os.mkfifo(tmp_path / name)
    check_recorded_tokenizer(str(tmp_path), Tokenizer(), None)


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "no JSON", '{"tokenizer_name": 3}'])
def test_what_is_no_record_records_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "sae_lens.json").write_text(content)
    check_recorded_tokenizer(str(tmp_path), Tokenizer(), None)


def test_a_record_is_not_read_without_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.text.recorded._MOST_BYTES", 10)
    (tmp_path / "sae_lens.json").write_text('{"tokenizer_name": "theirs"}')
    check_recorded_tokenizer(str(tmp_path), Tokenizer(), None)
