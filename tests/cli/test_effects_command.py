"""`sae effects`, and what it leaves beside features."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sae.errors import ConfigError, UnknownFeatureError
from sae.files.writing import write_json
from tests.support.calling import call


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "own"))


def test_effects_are_measured_written_and_shown_beside_features(run_folder: Path) -> None:
    few = ("--positions", 4, "--null-positions", 2, "--window", 3)
    result = call("effects", run_folder, "--features", 6, *few)
    assert "6 of 6 measured features by kl" in result.output
    assert re.search(r"Direct against measured change of the loss over features: r = -?0\.\d{3} over 6;", result.output)
    record = json.loads((run_folder / "effects.json").read_text())
    assert record["settings"]["positions"] == 4 and len(record["features"]) == 6
    assert (
        record["dictionary"]["weights_sha256"]
        == json.loads((run_folder / "eval.json").read_text())["dictionary"]["weights_sha256"]
    )
    assert (run_folder / "effects.md").read_text().startswith("# Effects of features at `blocks.1.hook_resid_pre`")
    assert (run_folder / "figures" / "effects.png").read_bytes().startswith(b"\x89PNG")

    known = [entry["feature"] for entry in record["features"]]
    other = next(feature for feature in range(64) if feature not in known)
    assert "ablated at " in call("features", run_folder, known[0]).output
    assert "ablated" not in call("features", run_folder, other).output
    assert call("effects", run_folder, other, *few, "--sort", "density").output.count("±") > 0
    assert "ablated" in call("features", run_folder, other).output
    page = run_folder / "page.html"
    call("features", run_folder, known[0], "--page", page)
    assert '"changed":"ablated"' in page.read_text(encoding="utf-8")

    record["dictionary"]["weights_sha256"] = "0" * 64
    write_json(run_folder / "effects.json", record)
    assert "ablated" not in call("features", run_folder, known[0]).output


def test_the_scale_reaches_the_measurement(run_folder: Path) -> None:
    result = call("effects", run_folder, "--features", 2, "--positions", 2, "--null-positions", 0, "--scale", 2)
    assert "features doubled" in result.output
    assert json.loads((run_folder / "effects-2.json").read_text())["settings"]["scale"] == 2
    assert (run_folder / "effects-2.md").is_file() and not (run_folder / "effects.json").exists()


def test_refusals_come_before_the_work(run_folder: Path) -> None:
    with pytest.raises(ConfigError, match="column 'size': effects are sorted by"):
        call("effects", run_folder, "--sort", "size")
    with pytest.raises(UnknownFeatureError, match="feature 64: the dictionary has features 0 to 63"):
        call("effects", run_folder, 64)
    with pytest.raises(ConfigError, match=r"no config.yaml there"):
        call("effects", run_folder / "none")
    assert not (run_folder / "effects.json").exists()
