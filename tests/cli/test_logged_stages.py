"""What commands say in a log: the stages, and after Ctrl-C whether they go on."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sae.cli import main as cli
from sae.runs.run import Run
from tests.conftest import make_tiny_config


@pytest.fixture(scope="module")
def trained(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a dictionary. Read only."""
    folder = tmp_path_factory.mktemp("logged") / "run"
    run = Run(make_tiny_config(tiny_model, text_folder, folder, {"evaluation.frozen_decoder_tokens": 0}))
    run.harvest()
    run.train()
    return folder


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls `sae` as where standard error is a file: status, and the lines there."""

    def call(*arguments: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["sae", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, capsys.readouterr().err.splitlines()

    return call


def test_hooks_compare_and_verify_say_what_they_do(trained: Path, tiny_model: Path, tmp_path: Path, logged) -> None:
    status, lines = logged("hooks", tiny_model)
    assert status == 0
    assert [line.partition(": done")[0] for line in lines] == [
        "load tiny", "load tiny", "read hook points", "read hook points",
    ]  # fmt: skip
    status, lines = logged("verify", trained)
    assert status == 0 and len(lines) == 2
    assert lines[0].startswith("verify: ") and lines[0].endswith(" files") and lines[1].startswith("verify: done in ")
    other = Path(shutil.copytree(trained / "dictionary", tmp_path / "other"))
    status, lines = logged("compare", trained, other, "evaluation.tokens=64", "evaluation.legacy_tokens=0")
    assert status == 0
    said = "\n".join(lines)
    for part in ("read dictionaries: 2 dictionaries", "evaluation: 64 held-out tokens", "load tiny: done in",
                 "evaluate: reconstruction: done in", "evaluate: language model: "):  # fmt: skip
        assert part in said, (part, said)


@pytest.mark.parametrize(
    ("place", "words", "last"),
    [
        ("sae.runs.verification._checked", ["verify", "RUN"], "interrupted; run the same command again to restart it"),
        ("sae.model.language_model.LanguageModel.__init__", ["hooks", "demo"],
         "interrupted; run the same command again to restart it"),
        ("sae.runs.run.collect", ["features", "RUN"], "interrupted; run the same command again to restart it"),
        ("sae.superposition.runner._run", ["superposition", "--out", "OUT", "geometry"],
         "interrupted; run the same command again to restart the experiment that was running"),
        ("sae.runs.run.evaluate_all", ["eval", "RUN"], "interrupted; run the same command again to continue"),
        ("sae.runs.comparison.evaluate_all", ["compare", "RUN", "OTHER"],
         "interrupted; run the same command again to continue"),
    ],
)  # fmt: skip
def test_after_ctrl_c_a_command_says_whether_it_goes_on(
    trained: Path, tmp_path: Path, logged, place: str, words: list[str], last: str
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.copytree(trained / "dictionary", tmp_path / "other")
    paths = {"RUN": run, "OTHER": tmp_path / "other", "OUT": tmp_path / "out"}
    with mock.patch(place, side_effect=KeyboardInterrupt):
        status, lines = logged(*(paths.get(word, word) for word in words))
    assert (status, lines[-1]) == (130, last), lines
