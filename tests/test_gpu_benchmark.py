"""The measurement on a lent GPU, tried without one; and the estimates of what a dictionary costs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
GPU = BENCHMARKS / "gpu.py"


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cost")


def dry_run(out: Path, *arguments: str) -> dict[str, Any]:
    """The report's JSON."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, GPU, "--dry-run", "--out", out, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in out.iterdir()) == ["gpu-dry-run.json", "gpu-dry-run.md"]
    return json.loads((out / "gpu-dry-run.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_dry_run_finds_something_in_every_part(tmp_path: Path) -> None:
    found = dry_run(tmp_path, "--minutes", "20")["parts"]
    states = {name: part["state"] for name, part in found.items()}
    parts = ("tests", "steps", "selection", "cached", "live", "harvest", "features", "evaluation")
    assert states == dict.fromkeys(parts, "done")
    rows = {name: list(part["rows"].values()) for name, part in found.items()}
    assert (rows["tests"][0]["passed"] > 0, rows["tests"][0]["failed"]) == (True, 0)
    timed = [row for row in rows["steps"] if row.get("toolkit") == "sae" and "floor" in row]
    assert [(row["shape"]["architecture"], row["shape"]["d_sae"]) for row in timed] == [
        ("topk", 256), ("batch_topk", 256), ("topk", 512), ("batch_topk", 512),
    ]  # fmt: skip
    assert all(0 < row["floor"] < min(row["seconds"]) for row in timed)
    scored = [row["quality"] for row in rows["steps"] if row.get("toolkit") == "sae" and "quality" in row]
    assert len(scored) == 2
    assert all(0 < quality["fvu"] < 1 and quality["l0"] == pytest.approx(4, abs=2) for quality in scored)
    toolkits = {row["toolkit"] for row in rows["steps"] if "toolkit" in row}
    assert {name.partition(",")[0] for name in toolkits} == {
        "sae", "sparsify", "saelens", "dictionary_learning", "llamascopium",
    }  # fmt: skip
    assert [row["rule"] for row in rows["selection"]] == [
        "TopK", "BatchTopK", "TopK and AuxK", "BatchTopK and AuxK",
    ]  # fmt: skip
    for name, count in (("cached", 2), ("live", 1), ("harvest", 6), ("features", 1), ("evaluation", 2)):
        assert len(rows[name]) == count, name
        assert all(row["tokens_per_second"] > 0 for row in rows[name])
    page = (tmp_path / "gpu-dry-run.md").read_text(encoding="utf-8")
    assert "### topk, 32 → 256, batch 128, k 4" in page
    assert page.count("\n## ") == sum(map(bool, rows.values()))


@pytest.mark.slow
def test_a_part_that_takes_too_long_loses_itself_alone(tmp_path: Path) -> None:
    """A sixth of a minute for two parts: one second for each, after those kept for the end."""
    found = dry_run(tmp_path, "--minutes", "0.17", "--only", "cached", "features")["parts"]
    assert found["cached"]["state"] == "stopped after 1 s"
    assert found["features"]["state"] in ("stopped after 1 s", "not reached")


def test_stand_ins_are_for_missing_packages_that_are_left_out() -> None:
    script = (
        "from absent import stand_in_for; stand_in_for('dictionary_learning')\n"
        "from nnsight.intervention import LanguageModel\n"
        "import json\n"
        "assert isinstance(LanguageModel, type) and json.dumps([]) == '[]'\n"
        "import not_there_at_all\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=BENCHMARKS / "peers", capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'not_there_at_all'"


def test_the_page_of_costs_is_what_the_script_writes(cost: ModuleType) -> None:
    written = cost.PAGE.read_text(encoding="utf-8")
    assert written == cost.page(cost.measured()), "run python benchmarks/cost.py"


def test_an_estimate_by_hand(cost: ModuleType) -> None:
    """GPT-2 small on an A100: its first eight blocks have 8 · 7,077,888 weights."""
    card = next(card for card in cost.CARDS if card.name == "A100 80GB")
    found = cost.estimate(cost.CASES[0], card)
    model = (2 * 8 * 7_077_888 + 8 * 4 * 128 * 768) / (0.4 * 312e12)
    step = 2 * 768 * 24_576 / (0.15 * 312e12) + (48 * 768 * 24_576 / 8192 + 16 * 32 * 768) / (0.8 * 2039e9)
    assert found.live == pytest.approx(1 / (model + step))
    assert found.harvest == pytest.approx(1e9 / 1536)  # the disk is slower than the model
    assert found.hours(3.6e6, live=True) == pytest.approx(1e3 * (model + step))
    assert found.hours(3.6e6, live=False) == pytest.approx(1e3 * (1536e-9 + max(step, 1536e-9)))


def test_what_was_measured_stands_beside_the_estimate(cost: ModuleType, tmp_path: Path) -> None:
    row = {"what": "loader to step, 768 → 24,576, batch 8,192, k 32", "tokens_per_second": 1234567.0}
    held = {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "parts": {"cached": {"rows": {"x": row}}}}
    (tmp_path / "gpu-h100.json").write_text(json.dumps(held), encoding="utf-8")
    found = cost.measured(tmp_path)
    assert found == {("H100", "GPT-2 small", "cached"): 1234567.0}
    line = next(line for line in cost.table(found, live=False).splitlines() if "| H100 |" in line)
    assert "| 1,234,567 |" in line
    assert "1,234,567" not in cost.table(found, live=True)


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4080", None), ("", None),
    ],
)  # fmt: skip
def test_names_of_cards(cost: ModuleType, device: str, card: str | None) -> None:
    assert cost.card_of(device) == card
