"""`sae info` shows what a dictionary's files say, at any width, and nothing that they do not say."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.architectures import ARCHITECTURES
from sae.dictionary.frame import Frame
from sae.files.hashes import UnhashedWarning
from sae.formats import outline
from tests.conftest import Command, assert_refused

FOLDERS = Path(__file__).parents[1] / "runs" / "folders"
LABELS = (
    "architecture", "widths", "number type", "reads", "gives", "language model", "weight processing",
    "training tokens", "dead features", "sae version", "converted from",
)  # fmt: skip
HOOK = "blocks.2.hook_resid_pre"
TRAINED = {"tokens": 1_000_000_000, "dead": 3, "dead_after_tokens": 10_000_000}
BETWEEN_MODELS: dict[str, Any] = {
    "origin_version": 2,
    "reads": [{"hook": "blocks.0.hook_mlp_in", "width": 4}, {"hook": "blocks.1.hook_mlp_in", "width": 4}],
    "gives": [{"hook": "blocks.1.hook_mlp_out", "width": 8, "model": "target"}],
    "model": {"name": "gpt2", "weight_processing": "center_and_fold"},
    "models": {"target": {"name": "tuned", "weight_processing": "none"}},
    "trained": TRAINED,
}


def rows(text: str, dictionaries: int = 1) -> dict[str, list[str]]:
    """The cells of each row of a table that has a word or a number in every cell."""
    lines = [line for line in text.splitlines() if line.startswith(LABELS)]
    labels = [next(label for label in LABELS if line.startswith(label)) for line in lines]
    cells = [
        line.removeprefix(label).replace(", ", ",").replace(" → ", "→").split()
        for label, line in zip(labels, lines, strict=True)
    ]
    return {label: row for label, row in zip(labels, cells, strict=True) if len(row) == dictionaries}


def test_runs_of_two_versions_stand_side_by_side(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those in the folders' `config.json`; the older one says `hook` and has no hashes."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(FOLDERS)
    warnings.simplefilter("ignore", UnhashedWarning)
    outcome = command("info", "d0ee045/run", "e192fda/run/dictionary")
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[0].split() == ["d0ee045/run", "e192fda/run/dictionary"]
    assert rows(outcome.out, dictionaries=2) == {
        "architecture": ["batch_topk,k=2"] * 2,
        "widths": ["256→16"] * 2,
        "number type": ["float32"] * 2,
        "reads": [HOOK] * 2,
        "gives": [HOOK] * 2,
        "language model": ["demo"] * 2,
        "weight processing": ["none"] * 2,
        "training tokens": ["3,072"] * 2,
        "dead features": ["0"] * 2,
        "sae version": ["0.1.0", "0.2.0"],
        "converted from": ["–"] * 2,
    }


def test_what_is_not_recorded_is_a_dash(command: Command, tmp_path: Path) -> None:
    """A file may hold anything under a known name; training too short for a feature to be dead says nothing of it."""
    odd = {
        "model": {"name": 7},
        "sae_version": ["0.2.0"],
        "converted": "from afar",
        "trained": {**TRAINED, "tokens": 9_999_999},
    }
    sae.ReLU(8, 16).save(tmp_path / "bare")
    sae.ReLU(8, 16, metadata=odd).bfloat16().save(tmp_path / "odd")
    bare, strange = (rows(command("info", tmp_path / name).out) for name in ("bare", "odd"))
    known = {"architecture": ["relu"], "widths": ["8→16"]}
    assert bare == {**{label: ["–"] for label in LABELS}, **known, "number type": ["float32"]}
    assert strange == {**bare, "number type": ["bfloat16"], "training tokens": ["9,999,999"]}


def test_several_hook_points_and_models_are_all_named(command: Command, tmp_path: Path) -> None:
    sae.TopK(8, 2048, k=3, metadata=BETWEEN_MODELS).save(tmp_path)
    lines = command("info", tmp_path).out.splitlines()
    words = [line.split() for line in lines]
    assert ["architecture", "topk,", "k=3"] in words and ["widths", "8", "→", "2,048", "→", "8"] in words
    assert ["training", "tokens", "1,000,000,000"] in words and ["dead", "features", "3"] in words
    at = words.index(["reads", "blocks.0.hook_mlp_in"])
    assert words[at + 1] == ["blocks.1.hook_mlp_in"]
    assert words[at + 2] == ["gives", "target:", "blocks.1.hook_mlp_out"]
    assert words[at + 3 : at + 5] == [["language", "model", "gpt2"], ["target:", "tuned"]]
    assert words[at + 5 : at + 7] == [["weight", "processing", "center_and_fold"], ["target:", "none"]]


def test_a_transcoder_has_three_widths_two_hook_points_and_perhaps_a_skip_connection(
    command: Command, tmp_path: Path
) -> None:
    metadata = {"hook": "blocks.0.mlp.hook_in", "target_hook": "blocks.0.hook_mlp_out"}
    dictionary = sae.TopK(8, 16, k=3, metadata=metadata)
    dictionary.set_frame(Frame(skip=True, d_out=6))
    dictionary.save(tmp_path)
    known = {"widths": ["8→16→6"], "reads": ["blocks.0.mlp.hook_in"], "gives": ["blocks.0.hook_mlp_out"]}
    out = command("info", tmp_path).out
    assert rows(out).items() >= known.items()
    assert "topk, k=3, skip=True," in out


@pytest.mark.parametrize("width", [48, 80, 120, 200])
def test_the_table_fits_and_cuts_no_number(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    model = {"name": "an-organisation/" + "long-name-" * 5, "weight_processing": "none"}
    folders = [tmp_path / f"{'a-long-name-' * 3}{number}" for number in range(5)]
    for folder in folders:
        sae.TopK(8, 16, k=2, metadata={"hook": HOOK, "model": model, "trained": TRAINED}).save(folder)
    out = command("info", *folders).out
    assert max(map(len, out.splitlines())) <= width
    assert out.count("1,000,000,000") == 5 and out.count(HOOK) == 10
    tables = [line for line in out.splitlines() if line.startswith("widths")]
    assert len(tables) == {48: 5, 80: 3, 120: 2, 200: 1}[width]


def test_a_folder_without_a_dictionary_is_one_line(command: Command, tmp_path: Path) -> None:
    sae.TopK(8, 16, k=2).save(tmp_path / "there")
    missing = "no config.json there; give a dictionary folder or a run folder"
    assert_refused(command("info", tmp_path), f"dictionary {str(tmp_path)!r}: {missing}")
    assert_refused(command("info", tmp_path / "there", tmp_path / "nowhere"), "nowhere", missing)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    warnings.simplefilter("ignore", UnhashedWarning)
    assert_refused(command("info", tmp_path), "config.json is not of this toolkit")


def test_it_is_in_the_help(command: Command) -> None:
    assert "info           Show what dictionaries are." in command("--help").out
    text = " ".join(command("info", "--help").out.split())
    assert "FOLDER..." in text and "no weights of dictionaries in our own format." in text
    assert command("info").status == 2


def test_it_needs_no_library_of_language_models() -> None:
    code = """
import sys
for name in ("transformer_lens", "transformers", "tokenizers", "datasets"):
    sys.modules[name] = None
from sae.cli.main import main
main()
"""
    command = [sys.executable, "-c", code, "info", str(FOLDERS / "e192fda" / "run")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert rows(done.stdout)["language model"] == ["demo"]


def test_no_weights_are_read(command: Command, tmp_path: Path) -> None:
    """Only their header is: a changed weight goes unnoticed here, but not a file that is too short or does not fit."""
    dictionary = sae.BatchTopK(8, 16, k=2, metadata={"hook": HOOK, "trained": TRAINED})
    dictionary.save(tmp_path)
    weights = tmp_path / "weights.safetensors"
    content = weights.read_bytes()
    whole = command("info", tmp_path).out
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert command("info", tmp_path).out == whole
    with pytest.raises(sae.SaeError, match="its SHA-256 is"):
        sae.load(tmp_path)
    weights.write_bytes(content[:-4])
    assert_refused(command("info", tmp_path), "weights.safetensors", "where its header says")
    weights.write_bytes(b"PK\x03\x04" + content)
    assert_refused(command("info", tmp_path), "a pickle, not a safetensors file")
    sae.BatchTopK(8, 24, k=2).save(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "weights.safetensors").read_bytes())
    assert_refused(command("info", tmp_path), "weights do not fit config.json: W_dec [24, 8], expected [16, 8]")
    weights.unlink()
    assert_refused(command("info", tmp_path), "weights.safetensors", "missing")


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outline_is_the_dictionary_without_its_weights(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    cls = ARCHITECTURES[architecture]
    made = cls(8, 64, metadata={"hook": HOOK}, **({"k": 3} if "k" in cls.setting_names else {}))  # type: ignore[call-arg]
    made.to(dtype).save(tmp_path)
    outlined, loaded = outline(tmp_path), sae.load(tmp_path)
    assert (outlined.device.type, outlined.dtype) == ("meta", dtype)
    assert outlined.config() == loaded.config()
    shapes = [{name: tuple(part.shape) for name, part in one.named_parameters()} for one in (outlined, loaded)]
    assert shapes[0] == shapes[1]
