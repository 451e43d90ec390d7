"""Dictionaries in folders side by side: by the command line and in Python, and what is measured only once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import sae
from sae.config.settings import RunConfig
from sae.errors import ConfigError
from sae.evaluation import Comparison, partial
from sae.files.writing import write_json
from sae.runs import comparison
from sae.runs.comparison import compare_folders
from sae.runs.run import Run
from tests.conftest import make_tiny_config


@pytest.fixture(scope="module")
def runs(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three trained runs on one cache, the first two evaluated. Read only."""
    folder = tmp_path_factory.mktemp("compared")
    for number, k in enumerate((4, 6, 8)):
        config = _config(tiny_model, text_folder, folder, f"k{k}", k)
        run = Run(config)
        run.harvest()
        run.train()
        if number < 2:
            run.evaluate()
    return folder


@pytest.fixture
def own(runs: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(runs, tmp_path / "own"))


def change_weights(folder: Path) -> None:
    dictionary = sae.load(folder)
    dictionary.W_enc.mul_(1.5)
    dictionary.save(folder)


def _config(tiny_model: Path, text_folder: Path, folder: Path, name: str, k: int) -> RunConfig:
    overrides = {
        "dictionary.k": k, "harvest.cache": str(folder / "cache"), "train.tokens": 2000, "data.held_out_tokens": 320,
    }  # fmt: skip
    return make_tiny_config(tiny_model, text_folder, folder / name, overrides)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Which dictionaries were evaluated together, call by call."""
    calls: list[list[str]] = []
    original = comparison.evaluate_all

    def counting(dictionaries: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(list(dictionaries))
        return original(dictionaries, *arguments, **options)

    monkeypatch.setattr(comparison, "evaluate_all", counting)
    return calls


def test_what_runs_have_measured_is_not_measured_again(runs: Path, evaluated: list[list[str]]) -> None:
    made = compare_folders([runs / "k4", runs / "k6"])
    assert evaluated == []
    stored = json.loads((runs / "k6" / "eval.json").read_text())
    assert made.dictionaries["k6"].metrics["fvu"].to_json() == stored["fvu"]
    three = compare_folders([runs / "k4", runs / "k6", runs / "k8"])
    assert evaluated == [["k8"]]
    assert three.dictionaries["k6"] == made.dictionaries["k6"]
    assert list(three.dictionaries) == ["k4", "k6", "k8"]
    l0 = three.dictionaries["k8"].differences["l0"].value
    assert l0 is not None and l0 > 3
    assert not (runs / "k8" / "eval.json").exists(), "only 'sae eval' writes into a run"


def test_together_or_from_files_is_the_same(runs: Path, evaluated: list[list[str]], tmp_path: Path) -> None:
    plain = [Path(shutil.copytree(runs / name / "dictionary", tmp_path / name)) for name in ("k4", "k6")]
    measured = compare_folders(plain, on=runs / "k8")
    assert evaluated == [["k4", "k6"]]
    stored = compare_folders([runs / "k4", runs / "k6"])
    assert measured.key == stored.key
    for name, made in stored.dictionaries.items():
        for metric, estimate in made.metrics.items():
            other = measured.dictionaries[name].metrics[metric]
            assert other.value == pytest.approx(estimate.value, rel=1e-4, abs=1e-5), (name, metric)


@pytest.mark.parametrize("what", ["weights", "k", "settings", "hook", "version", "activations"])
def test_what_is_stale_is_measured_again(
    own: Path, evaluated: list[list[str]], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    overrides: tuple[str, ...] = ()
    expected = ["k6"]
    if what == "weights":
        change_weights(own / "k6/dictionary")
    elif what == "k":
        path = own / "k6" / "dictionary" / "config.json"
        write_json(path, {**json.loads(path.read_text()), "k": 5})
    else:
        expected = ["k4", "k6"]
        if what == "settings":
            overrides = ("evaluation.tokens=96",)
        elif what == "version":
            monkeypatch.setattr("sae.files.version.__version__", "0.0.0")
        else:
            key, value = ("hook", "blocks.2.hook_resid_pre") if what == "hook" else ("activations", "0" * 64)
            for name in expected:
                path = own / name / "eval.json"
                write_json(path, {**json.loads(path.read_text()), key: value})
    compare_folders([own / "k4", own / "k6"], overrides=overrides)
    assert evaluated == [expected]


def test_a_run_knows_when_its_evaluation_is_stale(own: Path) -> None:
    run = Run.open(own / "k4", (f"harvest.cache={runs_cache(own)}",))
    assert run.is_evaluated()
    assert not Run.open(own / "k4", ("evaluation.tokens=96",)).is_evaluated()
    assert not Run.open(own / "k8").is_evaluated()
    (own / "k4" / "eval-documents.safetensors").unlink()
    assert not run.is_evaluated()


def runs_cache(folder: Path) -> str:
    return str(folder / "cache")


def test_a_written_comparison_is_read_again(own: Path, evaluated: list[list[str]], tmp_path: Path) -> None:
    places = [own / "k4" / "dictionary", own / "k8" / "dictionary"]
    first = compare_folders(places, on=own / "k4", out=tmp_path / "out")
    again = compare_folders(places, on=own / "k4", out=tmp_path / "out")
    assert len(evaluated) == 1
    assert again == first == Comparison.from_json(json.loads((tmp_path / "out" / "compare.json").read_text()))
    assert list(first.dictionaries) == ["k4/dictionary", "k8/dictionary"], "the shortest ends that differ"
    change_weights(own / "k8/dictionary")
    other = compare_folders(places, on=own / "k4", out=tmp_path / "out")
    assert len(evaluated) == 2 and other != first


def test_what_cannot_be_compared_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 dictionaries to compare: give two at least"):
        compare_folders([runs / "k4"])
    with pytest.raises(ConfigError, match=r"k4' is named twice: give every dictionary once"):
        compare_folders([runs / "k4", runs / "k6", runs / "k4"])
    with pytest.raises(ConfigError, match=r"none is a run folder, .* name a run with --on RUN"):
        compare_folders([runs / "k4" / "dictionary", runs / "k6" / "dictionary"])


def test_the_command_prints_and_writes(runs: Path, tmp_path: Path, command: Any) -> None:
    outcome = command("compare", runs / "k4", runs / "k6", "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    for part in ("fvu", "k4", "k6", "baseline", "frozen decoder, L0 6", "second lines: difference to k4"):
        assert part in outcome.out, part
    assert (tmp_path / "out" / "compare.md").is_file() and (tmp_path / "out" / "compare.json").is_file()
    refused = command("compare", runs / "k4", runs / "k6", "dictionary.k=3")
    assert refused.status == 1 and "evaluation does not read dictionary.k" in refused.err
    assert command("compare", runs / "k4").status == 1


@pytest.mark.parametrize("with_out", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_interrupted_comparison_goes_on(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_out: bool
) -> None:
    """What the second process does again is counted in batches, and it measures the same."""
    monkeypatch.setattr(partial, "EVERY", 0.0)
    places = [own / "k4" / "dictionary", own / "k8" / "dictionary"]
    options: dict[str, Any] = {
        "on": own / "k6", "overrides": ("evaluation.batch_contexts=2", "evaluation.frozen_decoder_tokens=0"),
    }  # fmt: skip
    stage = "evaluate: language model"
    whole: list[int] = []
    expected = compare_folders(
        places, **options, progress=lambda name, done, _: whole.append(done) if name == stage else None
    )
    assert not (own / "k6" / "comparison-unfinished").exists()
    out = tmp_path / "out" if with_out else None
    stop = whole[len(whole) // 2]

    def stopping(name: str, done: int, total: int) -> None:
        if name == stage and done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_folders(places, **options, out=out, progress=stopping)
    again: list[tuple[str, int]] = []
    made = compare_folders(places, **options, out=out, progress=lambda name, done, _: again.append((name, done)))
    assert made == expected
    done_again = [done for name, done in again if name == stage]
    assert done_again[0] == stop, "where it begins"
    assert len(done_again) == len([done for done in whole if done >= stop])
    assert [done for name, done in again if name == "evaluate: reconstruction"] == [made.evaluated["tokens"]]
    assert not (out or own / "k6").joinpath("comparison-unfinished").exists()


def test_a_comparison_needs_no_folder_that_can_be_written(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "k4" / "comparison-unfinished").write_text("a file in its place")
    made = compare_folders([own / "k4", own / "k8"])
    assert list(made.dictionaries) == ["k4", "k8"]


def test_every_stage_of_a_comparison_is_said(own: Path) -> None:
    stages: dict[str, int] = {}
    compare_folders([own / "k4", own / "k8"], progress=lambda stage, _, total: stages.setdefault(stage, total) and None)
    assert list(stages)[:2] == ["read dictionaries", "load tiny"] and "evaluate: language model" in stages
