"""BOS and separator are tokens of the tokenizer's files, not what its class makes up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sae.errors import ModelError
from sae.model.language_model import LanguageModel

CLASSES = [
    "GPT2Tokenizer", "CodeGenTokenizer", "WhisperTokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "RobertaTokenizer",
    "CohereTokenizer",
]  # fmt: skip


@pytest.fixture(scope="module")
def padded(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with more rows than its tokenizer has tokens, none of them special."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("padded") / "padded"
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(path) for path in sorted(text_folder.iterdir())], vocab_size=300)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(folder)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=360, bos_token_id=None)
    config.eos_token_id = None
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def changed(folder: Path, name: str, **entries: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def refusal(model: LanguageModel) -> str:
    with pytest.raises(ModelError) as caught:
        model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=True)
    return str(caught.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_cannot_make_up_a_token(kind: str, padded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(padded, tmp_path / "model")
    changed(folder, "tokenizer_config.json", tokenizer_class=kind)
    model = LanguageModel(str(folder))
    assert model.tokenizer.eos_token_id >= 300
    assert model.bos is None and model.separator is None
    assert "has no BOS or EOS token in its files ('" in refusal(model)
    assert refusal(model).endswith("made up by its class or settings); set data.prepend_bos=false")
    model.token_policy(prepend_bos=False, masked_positions=1, mask_special_tokens=True)


def test_settings_cannot_either(padded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(padded, tmp_path / "model")
    changed(folder, "tokenizer_config.json", bos_token="<s>")
    model = LanguageModel(str(folder))
    assert (model.tokenizer.bos_token_id, model.bos, model.separator) == (300, None, None)
    assert "('<s>' made up by its class or settings)" in refusal(model)


def test_nor_a_folder_of_vocabulary_and_merges_alone(padded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(padded, tmp_path / "model")
    parts = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(parts["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in parts["merges"]))
    model = LanguageModel(str(folder))
    assert model.tokenizer.bos_token_id == 300
    assert model.bos is None and model.separator is None
    vocabulary = {**parts["vocab"], "<|endoftext|>": 300}  # as GPT-2's has it
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    model = LanguageModel(str(folder))
    assert model.bos == model.separator == 300


@pytest.mark.parametrize("held_by", ["tokenizer.json", "added_tokens.json", "config.json"])
def test_a_token_that_a_file_holds_is_kept(held_by: str, padded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(padded, tmp_path / "model")
    changed(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    if held_by == "tokenizer.json":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.save_pretrained(folder)  # with <|endoftext|> among its added tokens
    elif held_by == "added_tokens.json":
        (folder / held_by).write_text(json.dumps({"<|endoftext|>": 300}))
    else:
        changed(folder, held_by, eos_token_id=300)
    model = LanguageModel(str(folder))
    assert model.bos == model.separator == 300
    assert model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=True).masked_ids == (300,)


def test_a_tokenizer_that_fails_is_no_surprise(padded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(padded, tmp_path / "model")
    changed(folder, "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    with pytest.raises(ModelError, match=r"its tokenizer, a GemmaTokenizer, cannot encode a text \(Unk .*; put"):
        LanguageModel(str(folder))
