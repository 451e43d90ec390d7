from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import DataError
from sae.model.language_model import LanguageModel
from sae.text.packing import Packer, packed_shards
from sae.text.prepared import prepared_documents

BOS, SEPARATOR = 900, 901


def pack_slowly(
    documents: list[list[int]], rows: int, context_length: int, bos: int | None, separator: int | None
) -> tuple[list[int], list[int]]:
    """One token at a time: (tokens, document of each), BOS belonging to the document of the token after it."""
    stream = [
        (token, number)
        for number, ids in enumerate(documents)
        for token in ([*ids, separator] if separator is not None else ids)
    ]
    tokens, owners = [], []
    place = 0
    while len(tokens) < rows:
        token, owner = stream[place]
        if bos is not None and len(tokens) % context_length == 0:
            token = bos
        else:
            place += 1
        tokens.append(token)
        owners.append(owner)
    return tokens, owners


def random_documents(seed: int, count: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(800) for _ in range(rng.choice([0, 1, 3, 20, 50]))] for _ in range(count)]


@pytest.mark.parametrize("separator", [SEPARATOR, None])
@pytest.mark.parametrize("bos", [BOS, None])
@pytest.mark.parametrize("shard_contexts", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 160, 161, 175])
def test_packing_equals_the_slow_reference(rows: int, shard_contexts: int, bos: int | None, separator: int | None):
    documents = random_documents(rows)
    packer = Packer(rows, 16, bos, separator)
    shards = []
    for number, ids in enumerate(documents):
        packer.add(str(number), ids)
        while (shard := packer.take(shard_contexts)) is not None:
            shards.append(shard)
    assert packer.full
    assert [len(shard.tokens) for shard in shards[:-1]] == [16 * shard_contexts] * (len(shards) - 1)
    tokens, owners = pack_slowly(documents, rows, 16, bos, separator)
    assert np.concatenate([shard.tokens for shard in shards]).tolist() == tokens
    assert np.concatenate([shard.documents for shard in shards]).tolist() == owners


@pytest.mark.parametrize("bos", [BOS, None])
def test_full_exactly_when_the_reference_has_enough(bos: int | None) -> None:
    for rows in range(1, 40):
        packer = Packer(rows, 8, bos, None)
        needed = next(
            count for count in range(50) if len_of_packed(count, 8, bos) >= rows
        )  # fmt: skip
        for count in range(needed):
            assert not packer.full
            assert packer.available == len_of_packed(count, 8, bos)
            packer.add(str(count), [1])
        assert packer.full
        taken = packer.take(100)
        assert taken is not None
        assert len(taken.tokens) == len(taken.documents) == rows
        assert packer.take(100) is None


def len_of_packed(text_tokens: int, context_length: int, bos: int | None) -> int:
    length = 0
    for _ in range(text_tokens):
        length += 1 + (bos is not None and length % context_length == 0)
    return length


def packed(config: DataConfig, language_model: LanguageModel, shard_contexts: int = 4) -> dict[str, Any]:
    rows = {TRAIN: config.tokens, HELD_OUT: config.held_out_tokens}
    packers = {s: Packer(rows[s], config.context_length, language_model.bos, language_model.separator) for s in SPLITS}
    found: dict[str, list[Any]] = {split: [] for split in SPLITS}
    for split, shard in packed_shards(config, language_model.tokenizer, shard_contexts, packers):
        found[split].append(shard)
    return {
        split: (
            np.concatenate([shard.tokens for shard in found[split]]),
            np.concatenate([shard.documents for shard in found[split]]),
            packers[split].names,
        )
        for split in SPLITS
    }


@pytest.mark.parametrize("tokens", [1000, 1009, 1025])
def test_text_comes_out_as_the_tokenizer_reads_it(
    tokens: int, text_folder: Path, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.text.prepared._CHARACTERS_AT_ONCE", 5000)
    config = DataConfig(
        source=str(text_folder), tokens=tokens, held_out_tokens=77, context_length=16, holdout_fraction=0.25
    )
    found = packed(config, language_model)
    for split, rows in ((TRAIN, tokens), (HELD_OUT, 77)):
        ids, owners, names = found[split]
        documents = [(name, text) for name, text, side in prepared_documents(config) if side == split]
        texts = [language_model.tokenizer.encode(text, add_special_tokens=False) for _, text in documents]
        expected = pack_slowly(texts, rows, 16, language_model.bos, language_model.separator)
        assert (ids.tolist(), owners.tolist()) == expected
        assert names == [name for name, _ in documents][: len(names)]
        assert len(names) == owners[-1] + 1


def test_too_little_text_names_what_was_found(text_folder: Path, language_model: LanguageModel) -> None:
    config = DataConfig(source=str(text_folder), tokens=10**7, held_out_tokens=50, context_length=16)
    train = [text for _, text, split in prepared_documents(config) if split == TRAIN]
    text_tokens = sum(len(language_model.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in train)
    there = len_of_packed(text_tokens, 16, language_model.bos)
    with pytest.raises(
        DataError, match=rf"the train documents hold {there:,} tokens, data.tokens=10,000,000 were asked for: lower it"
    ):
        packed(config, language_model)


def test_empty_side_of_the_split_says_how_to_fill_it(tmp_path: Path, language_model: LanguageModel) -> None:
    (tmp_path / "a.txt").write_text("one document is on one side " * 100, encoding="utf-8")
    (tmp_path / "b.txt").write_text("so is the other " * 100, encoding="utf-8")
    config = DataConfig(source=str(tmp_path), tokens=10, held_out_tokens=10, context_length=16, holdout_fraction=0.001)
    with pytest.raises(DataError, match=r"held-out documents hold 0 tokens, .* put no document there: change it") as no:
        packed(config, language_model)
    enough = float(str(no.value).partition("holdout_seed (")[2].partition(" ")[0])
    assert packed(config.model_copy(update={"holdout_fraction": enough}), language_model)[HELD_OUT][0].size == 10


@pytest.mark.parametrize("masked_positions", [0, 1, 3])
@pytest.mark.parametrize("ids", [(), (0,), (0, 3)])
def test_policy_masks_by_id_and_by_position(masked_positions: int, ids: tuple[int, ...]) -> None:
    policy = TokenPolicy(True, masked_positions, ids)
    tokens = torch.tensor([[0, 1, 3, 2], [3, 0, 0, 1]])
    expected = [
        [token not in ids and place >= masked_positions for place, token in enumerate(row)] for row in tokens.tolist()
    ]
    assert policy.eligible(tokens).tolist() == expected
    assert policy.eligible(tokens.int()).tolist() == expected
    assert tokens[0, 0] == 0
    assert TokenPolicy.from_json(policy.to_json()) == policy


def test_sections_of_a_file_remain_one_document(text_folder: Path) -> None:
    config = DataConfig(source=str(text_folder), section_characters=60, shuffle_documents=1000, holdout_fraction=0.25)
    splits: dict[str, set[str]] = {}
    texts: dict[str, list[str]] = {}
    for name, text, split in prepared_documents(config):
        splits.setdefault(name, set()).add(split)
        texts.setdefault(name, []).append(text)
    assert set(splits) == {path.name for path in text_folder.iterdir()}
    assert all(len(sides) == 1 for sides in splits.values())
    assert max(map(len, texts.values())) > 3, "nothing was cut"
    for name, parts in texts.items():
        assert sum(map(len, parts)) == len((text_folder / name).read_text(encoding="utf-8"))
    packer = Packer(40, 8, bos=0, separator=0)
    for name, ids in [("a", [1] * 10), ("b", [2] * 10), ("a", [3] * 10), ("b", [4] * 10)]:
        packer.add(name, ids)
    rows = packer.take(5)
    assert rows is not None
    assert packer.names == ["a", "b"]
    assert rows.documents[rows.tokens == 3].tolist() == [0] * 10


def test_a_single_text_file_has_held_out_sections(text_folder: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())) * 4)
    for config in (
        DataConfig(source=str(book), holdout_fraction=0.3),
        DataConfig(source=str(book), section_characters=500),
    ):
        found = list(prepared_documents(config))
        assert {split for _, _, split in found} == {"train", "held_out"}
        assert len({name for name, _, _ in found}) == len(found), "every section is a document of its own"
        assert "".join(text for _, text, _ in found) == book.read_text()
