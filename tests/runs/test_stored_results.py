"""Results that a run folder holds are read back, and nothing is measured for that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sae.errors import DamagedError, FormatError
from sae.evaluation import Report
from sae.evaluation.metrics import METRICS
from sae.files.writing import write_json
from sae.probing.settings import ProbeConfig
from sae.runs.probes import probe_run
from sae.runs.run import Run
from tests.conftest import make_tiny_config


@pytest.fixture(scope="module")
def evaluated(
    tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Report]:  # fmt: skip
    """A run folder with its evaluation. Read only."""
    run = Run(make_tiny_config(tiny_model, text_folder, tmp_path_factory.mktemp("stored") / "run", {}))
    run.harvest()
    run.train()
    return run.folder, run.evaluate()


@pytest.fixture
def folder(evaluated: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in which nothing can be evaluated."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be measured")

    for name in ("evaluate_all", "LanguageModel"):
        monkeypatch.setattr(f"sae.runs.run.{name}", refuse)
    return Path(shutil.copytree(evaluated[0], tmp_path / "run"))


def test_a_stored_report_has_the_numbers_of_the_evaluation(folder: Path, evaluated: tuple[Path, Report]) -> None:
    report, stored = evaluated[1], Run.open(folder).report()
    assert stored.record == json.loads(json.dumps(report.to_json()))
    assert list(stored.columns) == list(report.columns)
    for name, scores in report.columns.items():
        assert stored.columns[name].metrics["fvu"] == scores.reconstruction.fvu, name
    ours = stored.columns["dictionary"]
    assert ours.metrics.keys() == METRICS.keys() and ours.features == 64 and report.scores.sparsity is not None
    assert ours.dead == report.scores.sparsity.dead
    assert stored.totals.keys() == report.scores.totals.keys()
    assert all(torch.equal(column, report.scores.totals[name]) for name, column in stored.totals.items())


def test_a_report_is_read_without_the_activations(folder: Path) -> None:
    before = Run.open(folder).report()
    shutil.rmtree(folder / "activations")
    assert Run.open(folder).report().record == before.record


def test_a_report_of_something_else_is_refused(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"no evaluation of this dictionary with these settings .*'sae eval"):
        Run.open(folder, ("evaluation.tokens=64",)).report()
    content = (folder / "eval.json").read_text()
    (folder / "eval.json").write_text("{}")
    with pytest.raises(DamagedError):
        Run.open(folder).report()
    (folder / "eval.json").write_text(content)
    assert Run.open(folder).report().record == json.loads(content)
    (folder / "eval.json").unlink()
    with pytest.raises(FormatError, match="no evaluation of this dictionary"):
        Run.open(folder).report()


def test_stored_probes_are_read(evaluated: tuple[Path, Report], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(evaluated[0], tmp_path / "run"))
    with pytest.raises(FormatError, match=r"no probe results of this dictionary .*'sae probe"):
        Run.open(folder).probes()
    rows = [f"{('the river', 'a stone')[number % 2]} {number},{number % 2}" for number in range(40)]
    (tmp_path / "labels.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    settings = ProbeConfig(k=(1,), splits=1, examples=40, pca=False)
    record = probe_run(folder, [tmp_path / "labels.csv"], settings)
    assert Run.open(folder).probes().results.keys() == record.results.keys() == {"labels"}
    assert Run.open(folder).probes().results["labels"].to_json() == record.results["labels"].to_json()
    other = json.loads((folder / "probe.json").read_text())
    other["subject"]["dictionary"]["weights_sha256"] = "0" * 64
    write_json(folder / "probe.json", other)
    with pytest.raises(FormatError, match="no probe results of this dictionary"):
        Run.open(folder).probes()
