"""A draw of the cases of scripts/fuzz, which damages every file of a run folder in every way, under every verb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [pytest.param(200, id="200-cases")])
def test_damaged_folders_give_the_same_result_or_one_line(cases: int) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "fuzz_cases.py"), "--cases", str(cases), "--seed", "1", "--json"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=one_thread)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    totals = json.loads(done.stdout.splitlines()[-1])
    assert sum(totals.values()) == cases
    wrong = {kind: count for kind, count in totals.items() if kind not in ("same", "error")}
    assert not any(wrong.values()), totals
    assert totals["error"] > cases // 4 and totals["same"] > cases // 10, totals
