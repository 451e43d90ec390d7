"""Commands for run folders on a dictionary of another toolkit, with a model and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sae
from sae.runs.run import Run
from tests.conftest import Command, assert_refused, make_tiny_config

WORDS = (
    "data.tokens=1000", "data.held_out_tokens=200", "data.context_length=16", "harvest.dtype=float32",
    "evaluation.frozen_decoder_tokens=0", "device=cpu",
)  # fmt: skip
HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def foreign(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary in SAELens's files. Read only."""
    folder = tmp_path_factory.mktemp("foreign")
    run = Run(make_tiny_config(tiny_model, text_folder, folder / "run", {"train.tokens": 2000}))
    run.harvest()
    run.train()
    sae.convert(run.folder, folder / "saelens", "saelens")
    return folder / "saelens"


@pytest.fixture
def on(tiny_model: Path, text_folder: Path) -> tuple[Any, ...]:
    return ("--model", tiny_model, "--data", text_folder)


def test_every_command(
    foreign: Path, on: tuple[Any, ...], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluated = command("eval", foreign, *on, *WORDS)
    assert evaluated.status == 0, evaluated.err
    [folder] = (tmp_path / "runs").iterdir()
    assert "fvu" in evaluated.out and (folder / "eval.json").exists()
    before = json.loads((folder / "eval.json").read_bytes())

    listed = command("features", foreign, *on, *WORDS, "--limit", 5)
    assert listed.status == 0, listed.err
    measured = command("effects", foreign, *on, *WORDS, "--features", 4, "--positions", 2, "--null-positions", 1)
    assert measured.status == 0, measured.err
    texts = tmp_path / "texts.csv"
    rows = (f"the {'river' if number % 2 else 'stone'} number {number} opens,{number % 2}" for number in range(60))
    texts.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    probed = command("probe", foreign, texts, *on, *WORDS[:4], "device=cpu", "k=1", "splits=1")
    assert probed.status == 0, probed.err
    [folder] = (tmp_path / "runs").iterdir()
    for name in ("eval.json", "effects.json", "probe.json", "features/features.json"):
        assert (folder / name).exists(), f"{name}: every command works on one folder"
    by_folder = command("eval", folder)
    assert by_folder.status == 0, by_folder.err
    after = json.loads((folder / "eval.json").read_bytes())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}
    assert command("verify", folder).status == 0


def test_a_comparison(foreign: Path, on: tuple[Any, ...], command: Command, tmp_path: Path,
                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    sae.load(foreign).save(tmp_path / "ours")
    done = command("compare", foreign, tmp_path / "ours", *on, *WORDS, "out=runs/tokens", "--out", "results")
    assert done.status == 0, done.err
    record = json.loads(Path("results", "compare.json").read_bytes())
    assert list(record["dictionaries"]) == ["saelens", "ours"]
    assert record["dictionaries"]["ours"]["differences"]["fvu"]["value"] == 0
    assert [path.name for path in Path("runs").iterdir()] == ["tokens"]


def test_what_is_missing_is_named(
    foreign: Path, on: tuple[Any, ...], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(command("eval", foreign), "no config.yaml there", "with --model and --data")
    for verb, *words in (("eval",), ("features",), ("effects",), ("probe", "first-letters")):
        refused = command(verb, foreign, *words, "--model", "demo")
        assert_refused(refused, "give texts with --data, such as --data texts.txt")
    assert_refused(command("compare", foreign, "ours", "--model", "demo"), "give texts with --data")
    assert_refused(command("compare", foreign, tmp_path), "or give --model and --data")
    assert_refused(
        command("eval", foreign, *on, "train.lr=1"), "the run of a finished dictionary does not read train.lr"
    )
    assert_refused(command("features", foreign, *on, "dictionary.k=1"), "does not read dictionary.k; it reads model.,")
    assert_refused(command("eval", foreign, *on, "data.contxt_length=16"), "did you mean data.context_length?")
    assert_refused(command("eval", foreign, *on, "data.context_length=128"), "tiny reads at most 64 tokens")
    too_long = command("eval", foreign, *on, "data.tokens=100000000")
    assert_refused(too_long, "data.tokens")
