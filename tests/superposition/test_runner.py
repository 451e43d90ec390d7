"""`sae superposition`: its folder, what is skipped, what is refused, what an interruption leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import sae
from sae.errors import ConfigError, FormatError, TrainingInterrupted
from sae.files.formats import fingerprint_of
from sae.files.writing import write_json
from sae.superposition import EXPERIMENTS, ToyTraining, run
from sae.superposition.dictionaries import RecoverySettings
from sae.superposition.experiments import DimensionalitySettings, GeometrySettings, PhaseSettings

QUICK = ToyTraining(steps=60, batch_size=32)
SMALL = {
    "geometry": GeometrySettings(densities=(1.0, 0.1), runs=2, training=QUICK),
    "dimensionality": DimensionalitySettings(features=12, hidden=3, densities=4, training=QUICK),
    "phases-2-1": PhaseSettings(2, 1, densities=4, importances=3, restarts=2, training=QUICK),
    "phases-3-2": PhaseSettings(3, 2, densities=4, importances=3, restarts=2, training=QUICK),
    "recovery-toy": RecoverySettings(
        "toy", features=12, d_in=6, mean_l0=1.0, d_sae=12, k=2, tokens=2560, batch_size=128, scored=500
    ),
    "recovery-even": RecoverySettings(
        "even", features=24, d_in=12, mean_l0=2.0, d_sae=24, k=2, tokens=2560, batch_size=128, scored=500
    ),
    "recovery-hard": RecoverySettings(
        "hard", features=260, d_in=24, mean_l0=4.0, d_sae=64, k=4, tokens=2560, batch_size=128, scored=500
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all small experiments are done. Read only."""
    folder = tmp_path_factory.mktemp("out") / "finished"
    run(folder, settings=SMALL)
    return folder


def test_the_small_settings_are_of_all_experiments() -> None:
    assert set(SMALL) == set(EXPERIMENTS)
    assert all(type(SMALL[name]) is type(experiment.settings) for name, experiment in EXPERIMENTS.items())


def test_the_folder_has_numbers_tables_and_figures(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()} - {".lock", "SHA256SUMS"}
    assert names == {"superposition.json", "superposition.md", *(f"{name}.png" for name in EXPERIMENTS)}
    content = json.loads((finished / "superposition.json").read_text())
    assert list(content["experiments"]) == list(EXPERIMENTS)
    geometry = content["experiments"]["geometry"]
    assert geometry["settings"]["training"]["steps"] == 60 and geometry["sae_version"] == sae.__version__
    best = geometry["result"]["models"][0]
    assert sum(best["dimensionality"]) <= 2 + 1e-9 and len(best["losses"]) == 2
    text = (finished / "superposition.md").read_text()
    for name, experiment in EXPERIMENTS.items():
        assert f"## {experiment.title}" in text and f"]({name}.png)" in text
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| recall at 0.9 |" in text and "| batch_topk, tenth | frequency |" in text and "nan" not in text


def test_what_is_done_is_not_run_again(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir()}
    calls: list[str] = []
    done = run(finished, settings=SMALL, progress=lambda stage, *_: calls.append(stage))
    assert not calls and list(done) == list(EXPERIMENTS)
    assert {path: path.read_bytes() for path in finished.iterdir()} == before
    first = run(finished, ["geometry"], settings=SMALL)["geometry"]
    assert first.settings == SMALL["geometry"] and first.result == done["geometry"].result


def test_the_same_seed_gives_the_same_result_and_another_another(finished: Path, tmp_path: Path) -> None:
    names = ["geometry", "recovery-even"]
    kept = run(finished, names, settings=SMALL)
    again = run(tmp_path / "again", names, settings=SMALL)
    other = run(tmp_path / "other", names, settings=SMALL, seed=1)
    assert again["geometry"].result == kept["geometry"].result != other["geometry"].result
    a, b, c = (made["recovery-even"].result.dictionaries[0].scores for made in (again, kept, other))
    assert a == b != c


def test_other_settings_are_refused(finished: Path) -> None:
    before = (finished / "superposition.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"experiment 'geometry' in .*: made with seed=0, now 1; choose another folder"
    ):
        run(finished, ["geometry"], settings=SMALL, seed=1)
    changed = {**SMALL, "geometry": GeometrySettings(densities=(1.0, 0.1), runs=3, training=QUICK)}
    with pytest.raises(ConfigError, match="made with runs=2, now 3; choose another folder with --out"):
        run(finished, ["geometry"], settings=changed)
    changed = {**SMALL, "geometry": GeometrySettings(densities=(1.0, 0.1), runs=2)}
    with pytest.raises(ConfigError, match=r"made with training\.steps=60, now 3000"):
        run(finished, ["geometry"], settings=changed)
    assert (finished / "superposition.json").read_bytes() == before


def test_another_version_of_the_package_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.files.version.__version__", "9.9.9")
    with pytest.raises(ConfigError, match=r"made with sae version='.*', now '9.9.9'"):
        run(finished, ["geometry"], settings=SMALL)


def test_an_interruption_loses_only_the_running_experiment(tmp_path: Path) -> None:
    """Ctrl-C in a toy model's training, which Python raises by itself."""

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "dimensionality":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", ["geometry", "dimensionality"], settings=SMALL, progress=stop)
    kept = json.loads((tmp_path / "out" / "superposition.json").read_text())["experiments"]
    assert list(kept) == ["geometry"]
    stages: list[str] = []
    run(
        tmp_path / "out",
        ["geometry", "dimensionality"],
        settings=SMALL,
        progress=lambda stage, *_: stages.append(stage),
    )
    assert set(stages) == {"dimensionality"}


def test_a_stopped_training_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: Any) -> None:
        raise TrainingInterrupted("stopped at step 3 of 20")

    experiment = EXPERIMENTS["recovery-even"]
    monkeypatch.setitem(
        EXPERIMENTS, "recovery-even", type(experiment)("", experiment.settings, stopped, experiment.result)
    )
    with pytest.raises(TrainingInterrupted, match="experiment 'recovery-even' was stopped; those before it are in"):
        run(tmp_path / "out", ["recovery-even"], settings=SMALL)


def test_a_missing_figure_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "matplotlib", None)
        done = run(tmp_path / "out", ["geometry"], settings=SMALL)
        assert done["geometry"].figure is None
    assert "pip install 'sae[figures]'" in (tmp_path / "out" / "superposition.md").read_text()
    assert run(tmp_path / "out", ["geometry"], settings=SMALL)["geometry"].figure == "geometry.png"
    text = (tmp_path / "out" / "superposition.md").read_text()
    assert "](geometry.png)" in text and "pip install" not in text


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds 'notes.txt' and no superposition.json: it is not from 'sae superpos"):
        run(tmp_path, ["geometry"], settings=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="is a file: choose a folder with --out"):
        run(tmp_path / "notes.txt", ["geometry"], settings=SMALL)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    write_json(foreign / "superposition.json", {"format": "another"})
    with pytest.raises(FormatError, match=r"superposition\.json is not of this toolkit .*; choose another with --out"):
        run(foreign, ["geometry"], settings=SMALL)
    write_json(foreign / "superposition.json", {"format": "sae-superposition", "format_version": 99})
    with pytest.raises(
        FormatError, match=r"format version 99 is newer than this package reads \(1\); choose another with"
    ):
        run(foreign, ["geometry"], settings=SMALL)


def test_entries_with_old_names_of_settings_are_read(finished: Path, tmp_path: Path) -> None:
    """`world` is called `kind` now; the key was that of the old names."""
    content = json.loads((finished / "superposition.json").read_text())
    entry = content["experiments"]["recovery-even"]
    for part in (entry["settings"], entry["result"]):
        part["world"] = part.pop("kind")
    identity = {"name": "recovery-even", "settings": entry["settings"], "seed": 0, "version": sae.__version__}
    entry["key"] = fingerprint_of(identity)
    write_json(tmp_path / "superposition.json", content)
    calls: list[str] = []
    done = run(tmp_path, ["recovery-even"], settings=SMALL, progress=lambda stage, *_: calls.append(stage))
    assert not calls
    assert done["recovery-even"].settings == SMALL["recovery-even"] and done["recovery-even"].result.kind == "even"
    with pytest.raises(ConfigError, match="made with seed=0, now 1; choose another folder"):
        run(tmp_path, ["recovery-even"], settings=SMALL, seed=1)


def test_the_old_name_of_a_setting_is_refused_with_the_new_one() -> None:
    with pytest.raises(ConfigError, match="setting 'world' is called 'kind' now"):
        RecoverySettings(**{"world": "even"})


def test_a_damaged_entry_is_refused(finished: Path, tmp_path: Path) -> None:
    content = json.loads((finished / "superposition.json").read_text())
    del content["experiments"]["geometry"]["result"]["models"][0]["density"]
    write_json(tmp_path / "superposition.json", content)
    with pytest.raises(FormatError, match=r"experiment 'geometry' in .* cannot be read"):
        run(tmp_path, ["dimensionality"], settings=SMALL)


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command) -> None:
    for name, experiment in list(EXPERIMENTS.items()):
        small = type(experiment)(experiment.title, SMALL[name], experiment.run, experiment.result)
        monkeypatch.setitem(EXPERIMENTS, name, small)
    status, printed, _ = command("superposition", "geometry", "phases-2-1", "--out", tmp_path / "out")
    assert status == 0
    assert "Features in the plane as density falls" in printed and "2 experiments in" in printed
    assert "cells of margin" in printed
    status, _, error = command("superposition", "geometri", "--out", tmp_path / "other")
    assert status == 1
    assert "experiment 'geometri': expected one of geometry, dimensionality, phases-2-1" in error
    status, _, error = command("superposition", "--seed", 2**63, "--out", tmp_path / "other")
    assert status == 2 and "9223372036854775808 is not in the range 0<=x<=9223372036854775807" in error
    assert not (tmp_path / "other").exists()


def test_the_help_names_every_experiment(command) -> None:
    text = " ".join(command("superposition", "--help").out.split())
    assert ", ".join(EXPERIMENTS) in text
