"""A GGUF is converted by the first command that reads it; the others take the copy, which gives the same numbers."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from support.gguf import write_gguf

from sae.config.sources import ModelConfig
from sae.model import gguf_copies
from sae.model.loading import load_pretrained


@pytest.fixture
def gguf(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Llama with the tiny model's tokenizer, and a cache of its own for copies."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return write_gguf(tmp_path / "tiny.gguf", tiny_model)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every model that transformers loads out of a GGUF."""
    load, seen = transformers.AutoModelForCausalLM.from_pretrained, []

    def counted(source: object, **arguments: object) -> object:
        seen.extend([str(source)] if "gguf_file" in arguments else [])
        return load(source, **arguments)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", counted)
    return seen


def _logits(path: Path, dtype: str = "float32") -> tuple[torch.Tensor, list[int], str]:
    model, tokenizer, label, *_ = load_pretrained(ModelConfig(name=str(path), dtype=dtype))
    tokens = tokenizer("the cat sat on a mat, 12 times\n\tdef f():").input_ids
    return model(torch.tensor([tokens])).logits, tokens, label


def test_the_second_command_takes_the_copy_and_gets_the_same(gguf: Path, conversions: list[str]) -> None:
    first, second = _logits(gguf), _logits(gguf)
    assert len(conversions) == 1
    assert first[0].abs().max() > 0.1
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:] == (first[1], "tiny.gguf")


def test_number_types_and_contents_have_copies_of_their_own(
    gguf: Path, conversions: list[str], tiny_model: Path
) -> None:
    float32, bfloat16 = _logits(gguf), _logits(gguf, "bfloat16")
    assert (float32[0].dtype, bfloat16[0].dtype) == (torch.float32, torch.bfloat16)
    write_gguf(gguf, tiny_model, seed=1)
    assert not torch.equal(_logits(gguf)[0], float32[0])
    assert len(conversions) == 3


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_copy_is_made_again(gguf: Path, conversions: list[str], file: str) -> None:
    first = _logits(gguf)
    [copy] = (Path(constants.HF_HOME) / "sae-dequantised").iterdir()
    content = bytearray((copy / file).read_bytes())
    content[len(content) // 2] ^= 4
    (copy / file).write_bytes(content)
    with pytest.warns(UserWarning, match="made again from the GGUF"):
        assert torch.equal(_logits(gguf)[0], first[0])
    assert len(conversions) == 2
    _logits(gguf)
    assert len(conversions) == 2


def test_a_copy_that_the_machine_cannot_read_now_is_passed_over_and_stays(
    gguf: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _logits(gguf)
    [copy] = (Path(constants.HF_HOME) / "sae-dequantised").iterdir()
    opened = os.open

    def refusing(path: object, *arguments: int, **named: int) -> int:
        if str(path).startswith(str(copy)):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as machine, pytest.warns(UserWarning, match="ulimit"):
        machine.setattr(os, "open", refusing)
        assert torch.equal(_logits(gguf)[0], first[0])
    assert len(conversions) == 2
    assert torch.equal(_logits(gguf)[0], first[0])
    assert len(conversions) == 2


@pytest.mark.parametrize("obstacle", ["a file in its place", "little space"])
def test_without_a_place_for_the_copy_the_model_is_there_all_the_same(
    gguf: Path, conversions: list[str], obstacle: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if obstacle == "little space":
        monkeypatch.setattr(gguf_copies, "free_bytes", lambda _: 1000)
    else:
        (tmp_path / "home").write_text("")
    assert torch.equal(_logits(gguf)[0], _logits(gguf)[0])
    assert len(conversions) == 2
    assert not (tmp_path / "home" / "sae-dequantised").exists()


def test_a_copy_without_hashes_is_made_again(gguf: Path, conversions: list[str]) -> None:
    _logits(gguf)
    [copy] = (Path(constants.HF_HOME) / "sae-dequantised").iterdir()
    (copy / "SHA256SUMS").unlink()
    with pytest.warns(UserWarning, match="made again from the GGUF"):
        _logits(gguf)
    _logits(gguf)
    assert len(conversions) == 2


@pytest.mark.parametrize("stem", ["n" * 245, "字" * 80, "bad\udcff", "two\nlines"])
def test_the_copy_of_a_file_of_any_name_has_a_name_that_can_be_written(stem: str, tmp_path: Path) -> None:
    path = tmp_path / f"{stem}.gguf"
    path.write_bytes(b"GGUF")
    folder = gguf_copies.folder_of(path, "float32")
    assert folder is not None
    assert len(folder.name.encode()) < 230
    assert not gguf_copies.is_whole(folder)
