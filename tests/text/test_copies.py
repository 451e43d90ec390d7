"""Lists of ids and chats that differ only in what becomes of no token: they are one document, on one side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.model.language_model import LanguageModel
from sae.text.census import Census
from sae.text.document import Chat, TokenIds
from sae.text.packing import Packer, packed_shards
from sae.text.prepared import prepared_documents
from sae.text.tokenise import ContentTokenizer

CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ m.tool_calls }}\n{% endfor %}"


def write(folder: Path, forms: list[list[Any]]) -> DataConfig:
    for number, rows in enumerate(forms):
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return DataConfig(source=str(folder), context_length=16, holdout_fraction=0.4, tokens=180, held_out_tokens=100)


def read(config: DataConfig, model: LanguageModel, reading: int = 3) -> tuple[dict[str, set[str]], int]:
    """Names of the documents that were packed, by split, and how many were equal to one of them."""
    rows = {TRAIN: config.tokens, HELD_OUT: config.held_out_tokens}
    packers = {split: Packer(rows[split], config.context_length, None, model.separator) for split in SPLITS}
    census = Census()
    list(packed_shards(config, model.tokenizer, 4, packers, census=[census], reading=reading, model_rows=model.rows))
    return {split: set(packer.names) for split, packer in packers.items()}, census.duplicates


def test_ids_with_and_without_special_ids_at_the_ends_are_equal(language_model: LanguageModel, tmp_path: Path) -> None:
    end = language_model.separator
    assert end is not None
    ids = [[5 + (7 * number + place) % 300 for place in range(12)] for number in range(30)]
    forms = [ids, [[*one, end] for one in ids], [[end, *one] for one in ids], [[*one, *[end] * 7] for one in ids]]
    config = write(tmp_path, forms)
    found, duplicates = read(config, language_model)
    assert duplicates == 90 and all(name.startswith("0.jsonl") for names in found.values() for name in names)
    assert read(config, language_model, reading=2)[1] == 0
    inner = [[*one[:6], end, *one[6:]] for one in ids]
    assert read(write(tmp_path, [ids, inner, [], []]), language_model)[1] == 0


def test_chats_that_the_template_writes_alike_are_equal(
    language_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model.tokenizer, "chat_template", CHATML)
    chats = [[{"role": "user", "content": f"What is {n}?"}, {"role": "bot", "content": f"{n}"}] for n in range(40)]
    named = [[{**one, "id": f"{n}-{one['role']}", "name": "x"} for one in chat] for n, chat in enumerate(chats)]
    spaced = [[{**one, "content": f" {one['content']} "} for one in chat] for chat in chats]
    calls = [[{**one, "tool_calls": [{"id": "1"}]} for one in chat] for chat in chats]
    texts = [f"<user>What is {n}?\n<bot>{n}\n" for n in range(40)]
    contents = ContentTokenizer(language_model.tokenizer)
    try:
        plain = contents.compared(Chat(tuple(chats[0])))
        assert plain == texts[0]
        assert all(contents.compared(Chat(tuple(form[0]))) == plain for form in (named, spaced))
        assert contents.compared(Chat(tuple(calls[0]))) != plain
    finally:
        contents.close()
    config = write(tmp_path, [chats, named, spaced, texts])
    assert read(config, language_model)[1] == 120


def test_without_a_template_what_templates_read_is_compared(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"What is {n}?"}] for n in range(4)]
    others = [[{**one, "id": n, "timestamp": 3.5} for one in chat] for n, chat in enumerate(chats)]
    calls = [[{**one, "tool_calls": ["f"]} for one in chat] for chat in chats]
    census = Census()
    names = [name for name, _, _ in prepared_documents(write(tmp_path, [chats, others, calls]), census=census)]
    assert census.duplicates == 4 and not any(name.startswith("1.") for name in names) and len(names) == 8


def test_only_special_ids_are_equal_to_none(language_model: LanguageModel) -> None:
    contents, end = ContentTokenizer(language_model.tokenizer), language_model.separator
    compared = contents.compared(TokenIds(np.array([end, end], dtype=np.int32)))
    assert isinstance(compared, TokenIds) and len(compared.ids) == 0
