"""`sae export` writes a run's features for other viewers, and says what it leaves empty."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import sae
from tests.conftest import Command, assert_refused
from tests.support.viewer_schemas import DashboardBatch, imported

RUN = Path(__file__).parents[1] / "runs" / "folders" / "e192fda"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on the demo model, with a feature store."""
    shutil.copytree(RUN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def test_a_run_goes_to_neuronpedia(command: Command, run: Path) -> None:
    done = command(
        "export", run, "out", "--to", "neuronpedia", "--set", "res-a", "--creator", "Somebody", "--features", "3,0-2"
    )
    assert done.status == 0, done.err
    assert done.out.splitlines()[0] == "4 features as demo/2-res-a of Neuronpedia: 6 files in out"
    empty = [line.strip().removeprefix("left empty: ") for line in done.out.splitlines()[1:]]
    assert "logits_hist_data_*: needs the language model" in empty
    assert not any(line.startswith(("dataset", "layers", "neuron_alignment")) for line in empty), (
        "the dictionary has them"
    )
    tables = imported(Path("out"))
    assert [row.index for row in tables["features"]] == ["3", "0", "1", "2"]
    assert (tables["model"][0].layers, tables["model"][0].dimension) == (4, 256)
    assert (tables["source"][0].dataset, tables["source"][0].num_prompts) == ("texts", 24)
    assert tables["release"][0].creatorName == "Somebody"
    assert tables["features"][0].hookName == "blocks.2.hook_resid_pre"
    assert tables["features"][0].pos_str == [entry.token for entry in sae.Features(run)[3].promoted or ()]


def test_a_store_alone_goes_to_saedashboard(command: Command, run: Path) -> None:
    done = command("export", run / "features", "out", "--to", "saedashboard", "--model", "demo-model")
    assert done.status == 0, done.err
    assert "left empty: neuron_alignment_*: needs the dictionary" in done.out
    batch = DashboardBatch.model_validate(json.loads(Path("out/batch-0.json").read_bytes()))
    assert (batch.model_id, batch.layer, batch.sae_set, len(batch.features)) == ("demo-model", 2, "run", 16)


def test_the_histogram_of_logits_comes_with_the_model(command: Command, run: Path) -> None:
    done = command("export", run, "out", "--to", "saedashboard", "--features", "1", "--with-model")
    assert done.status == 0, done.err
    assert "logits_hist_data_*" not in done.out
    [feature] = DashboardBatch.model_validate(json.loads(Path("out/batch-0.json").read_bytes())).features
    assert sum(feature.logits_hist_data_bar_heights) == len(sae.Features(run).vocabulary)
    width = feature.logits_hist_data_bar_values[1] - feature.logits_hist_data_bar_values[0]
    assert feature.logits_hist_data_bar_values[-1] + width / 2 == pytest.approx(feature.pos_values[0], rel=1e-4)
    assert feature.logits_hist_data_bar_values[0] - width / 2 == pytest.approx(feature.neg_values[0], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "1-"], "'1-' is neither a feature number nor a range"),
        (["--features", "x"], "'x' is neither"),
        (["--features", "5-2"], "'5-2' ends before it begins"),
        (["--features", "99999999999"], "is neither"),
        (["7"], "7: give features by --features 7"),
    ],
)
def test_numbers_that_are_none(command: Command, run: Path, words: list[str], message: str) -> None:
    done = command("export", run, "out", "--to", "neuronpedia", *words)
    assert done.status == 2
    assert message in done.err
    assert not Path("out").exists()


def test_errors_are_one_line_and_write_nothing(command: Command, run: Path) -> None:
    assert_refused(command("export", run, "out", "--to", "other"), "viewer 'other': files are written for neuronpedia")
    assert_refused(command("export", run, run, "--to", "neuronpedia"), "'run': already there; give a new folder")
    assert_refused(command("export", run, "out", "--to", "neuronpedia", "--features", "16"), "features 0 to 15")
    assert_refused(command("export", run, "out", "--to", "neuronpedia", "train.lr=1"), "does not read train.lr")
    assert_refused(command("export", "nowhere", "out", "--to", "neuronpedia"), "no features.json there")
    assert command("export", run / "features", "out", "--to", "neuronpedia", "--with-model").status == 2
    assert not Path("out").exists()
