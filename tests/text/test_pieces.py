"""Tokens of long texts joined from windows, against the same texts tokenised in one go."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.errors import DataError
from sae.model.language_model import LanguageModel
from sae.text.corpus import standard_library
from sae.text.packing import Packer, packed_shards
from sae.text.pieces import token_parts
from sae.text.sections import sections
from tests.support.tokenizer_kinds import KINDS, make

SMALL = 60_000
LARGE, LARGEST = 1_000_000, 10_000_000
LEARNT = 20_000
LIKE_OTHERS = ("roberta", "t5")  # gpt2 and xlnet with a space put before
RARE = [*"naïve Ünïcode 漢字かな 😀👩‍👩‍👧 ﬁ ½ 12345".split(), "e\u0301", "\t", "  "]


def source(characters: int) -> str:
    """Code and prose, with some of what is rare there."""
    rng, found, length = random.Random(0), [], 0
    for document in standard_library():
        found.append(str(document.text) + " ".join(rng.choices(RARE, k=20)))
        length += len(found[-1])
        if length >= characters:
            break
    return "".join(found)[:characters]


def shapes(text: str) -> Iterator[tuple[str, str]]:
    yield "lines", text
    yield "one line", text.replace("\n", " ")
    yield "no spaces", "".join(text.split())
    yield "letters", "".join(random.Random(1).choices("abcdefghij", k=len(text)))
    yield "digits", "".join(random.Random(2).choices("0123456789", k=len(text)))


def check(kind: str, text: str, learnt: str) -> None:
    tokenizer = make(kind, learnt)
    for shape, shaped in shapes(text):
        if kind == "bert" and shape in ("letters", "digits"):
            continue  # one word of any length is one unknown token
        whole = tokenizer(shaped, add_special_tokens=False, verbose=False)["input_ids"]
        pieces = (shaped[start : start + 10_007] for start in range(0, len(shaped), 10_007))
        joined = np.concatenate(list(token_parts(tokenizer, pieces, "a")))
        assert joined.tolist() == whole, (kind, shape)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in LIKE_OTHERS)) for kind in KINDS]
)
def test_windows_join_to_the_tokens_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.text.pieces._WINDOW", 7_001)
    monkeypatch.setattr("sae.text.pieces._OVERLAPS", (499, 1_999, 3_001))
    text = source(2 * SMALL)
    check(kind, text[SMALL:], text[:LEARNT])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_megabyte_joins_to_the_tokens_of_the_whole(kind: str) -> None:
    """With windows as they are; ten megabytes take an hour: `python tests/text/test_pieces.py`."""
    text = source(LARGE)
    check(kind, text, text[:300_000])


def test_what_cannot_be_joined_is_said() -> None:
    tokenizer = make("bert", source(SMALL))
    with pytest.raises(DataError, match=r"document 'a': too long to be tokenised at once.*data.section_ch"):
        list(token_parts(tokenizer, ("x" * 100_000 for _ in range(5)), "a"))

    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="the tokenizer does not give the positions of its tokens"):
        list(token_parts(Slow(), ["text"], "a"))


def test_no_more_is_read_than_the_tokens_need(tmp_path: Path, language_model: LanguageModel) -> None:
    """A text without end."""
    read = itertools.count()

    def endless() -> Iterator[str]:
        for number in read:
            yield f"{number} the river keeps a stone house " * 3000

    parts = token_parts(language_model.tokenizer, endless(), "a")
    first = next(parts)
    assert len(first) > 10_000
    assert next(read) < 8
    del parts


@pytest.mark.parametrize("shape", ["lines", "one line", "no spaces"])
def test_long_files_give_their_tokens_in_order(
    shape: str, tmp_path: Path, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beyond what is held in memory, beside a short one; every token as in one go."""
    monkeypatch.setattr("sae.text.files._HELD_WHOLE", 5_000)
    monkeypatch.setattr("sae.text.files._BYTES_AT_ONCE", 3_001)
    monkeypatch.setattr("sae.text.pieces._WINDOW", 3_001)
    monkeypatch.setattr("sae.text.pieces._OVERLAPS", (499, 997))
    text = dict(shapes(source(30_000)))[shape]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("the river " * 400, encoding="utf-8")
    seed = next(s for s in range(99) if _sides(tmp_path, s) == [TRAIN, HELD_OUT])
    tokenizer: Any = language_model.tokenizer
    ids = tokenizer.encode((tmp_path / "a.txt").read_text(encoding="utf-8"), add_special_tokens=False)
    for rows in (700, len(ids) + 1):
        config = DataConfig(source=str(tmp_path), holdout_fraction=0.5, holdout_seed=seed, context_length=16)
        packers = {s: Packer(rows if s == TRAIN else 50, 16, None, language_model.separator) for s in SPLITS}
        shards = [shard.tokens for split, shard in packed_shards(config, tokenizer, 4, packers) if split == TRAIN]
        assert np.concatenate(shards).tolist() == [*ids, language_model.separator][:rows]


def _sides(folder: Path, seed: int) -> list[str]:
    from sae.text.prepared import prepared_documents

    config = DataConfig(source=str(folder), holdout_fraction=0.5, holdout_seed=seed)
    return [split for _, _, split in prepared_documents(config)]


def test_sections_end_at_lines_then_spaces_then_anywhere() -> None:
    rng = random.Random(0)
    for kind, ends in (("a \n", "\n"), ("a ", " "), ("ab", "")):
        text = "".join(rng.choices(kind, weights=[60, 10, 1][: len(kind)], k=5000))
        found = list(sections((text[start : start + 77] for start in range(0, len(text), 77)), 100))
        assert "".join(found) == text
        assert found == list(sections([text], 100))
        assert all(100 <= len(section) <= 201 for section in found[:-1])
        if ends == " ":
            assert all(section.startswith(" ") for section in found[1:])
        if ends == "\n":
            assert sum(section.endswith("\n") for section in found) > len(found) * 0.4


if __name__ == "__main__":
    for name in KINDS:
        check(name, source(LARGEST), source(300_000))
        print(f"{name}: five texts of {LARGEST:,} characters, tokens equal to those in one go", flush=True)
