"""Tokens for which the model has no embedding: named before the model reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.activations.harvest import harvest
from sae.config.sources import ModelConfig
from sae.dictionary.model_identity import fingerprint
from sae.errors import DataError, ModelError
from sae.model.language_model import LanguageModel
from sae.probing.activations import read_activations
from sae.probing.data import find_data
from sae.probing.examples import Examples
from tests.conftest import make_tiny_config


def copied(tiny_model: Path, folder: Path, change: Callable[[Any], None] | None = None) -> LanguageModel:
    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, folder)
    if change is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)
    return LanguageModel(ModelConfig(name=str(folder)))


@pytest.fixture(scope="module")
def larger(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A model whose tokenizer has one token more than the model."""
    folder = tmp_path_factory.mktemp("larger") / "larger"
    return copied(tiny_model, folder, lambda tokenizer: tokenizer.add_tokens(["walrus"]))


def source(tmp_path: Path, rows: list[Any]) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["text", "ids", "long"])
def test_a_token_without_a_row_is_named(
    kind: str, larger: LanguageModel, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.text.tokenise.WHOLE", 100)
    rows = len(larger.tokenizer) - 1
    texts = {"text": "the walrus", "ids": [5, rows], "long": "the old river " * 50 + "walrus"}
    others = [f"the river {number} " * 5 for number in range(200)]
    config = make_tiny_config(tiny_model, source(tmp_path, [texts[kind], *others]), tmp_path / "run", {})
    with pytest.raises(DataError) as caught:
        harvest(config, larger)
    assert str(caught.value) == (
        f"document 'a.jsonl:1': it has the token 'walrus' with the id {rows}, and the model has embeddings of {rows} "
        "tokens; load the tokenizer that the model was trained with"
    )


def test_tokens_that_no_text_has_need_no_row(larger: LanguageModel, tiny_model: Path, tmp_path: Path) -> None:
    others = [f"the river {number} " * 5 for number in range(200)]
    config = make_tiny_config(tiny_model, source(tmp_path, others), tmp_path / "run", {})
    assert harvest(config, larger).manifest.complete


def test_probes_name_the_token(larger: LanguageModel) -> None:
    examples = Examples(((1, len(larger.tokenizer) - 1),), (0,), (1,), (0,), labels=("a",), groups=(0,), left_out=0)
    with pytest.raises(ModelError, match=r"gives the token 'walrus' with the id \d+, and the model has embeddings of"):
        read_activations(larger, "blocks.1.hook_resid_pre", examples)


def test_ids_beyond_a_hole_in_the_vocabulary_are_valid(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    folder = shutil.copytree(tiny_model, tmp_path / "hole")
    path = folder / "tokenizer.json"
    record = json.loads(path.read_text())
    last = max(record["model"]["vocab"], key=record["model"]["vocab"].get)
    record["model"]["vocab"][last] += 50
    path.write_text(json.dumps(record))
    largest = record["model"]["vocab"][last]
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.resize_token_embeddings(largest + 1)
    model.save_pretrained(folder)
    rows = [[5 + (number + place) % 100 for place in range(20)] + [largest] for number in range(100)]
    config = make_tiny_config(folder, source(tmp_path, rows), tmp_path / "run", {})
    assert harvest(config, LanguageModel(ModelConfig(name=str(folder)))).manifest.complete
    config = make_tiny_config(folder, source(tmp_path, [[largest + 1], *rows]), tmp_path / "other", {})
    with pytest.raises(
        DataError, match=rf"token id {largest + 1} is outside the vocabulary, which ends with {largest}"
    ):
        harvest(config, LanguageModel(ModelConfig(name=str(folder))))


def test_a_model_without_a_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(
        ModelError, match=r"bare': its tokenizer gives no tokens for 'The sum .*; are its files missing"
    ):
        LanguageModel(ModelConfig(name=str(folder)))


def test_weights_are_regular_files(tiny_model: Path, tmp_path: Path) -> None:
    """A pipe would be waited for."""
    import os

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    before = fingerprint(str(folder))
    os.mkfifo(folder / "old.safetensors")
    (folder / "old.bin").mkdir()
    (folder / "lost.gguf").symlink_to("nowhere")
    assert fingerprint(str(folder)) == before
    assert LanguageModel(ModelConfig(name=str(folder))).info.fingerprint == before
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors is a pipe, a device or a broken link where a file"):
        LanguageModel(ModelConfig(name=str(folder)))


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_labelled_texts_are_regular_files(kind: str, tmp_path: Path) -> None:
    import os

    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    path = tmp_path / "x.csv"
    {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(
        DataError, match=r"x.csv': not a regular file \(a folder, a pipe or a link to nothing\); move it"
    ):
        find_data([str(tmp_path)])
