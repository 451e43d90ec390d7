"""The tests that need a GPU, and those of the kernels, compiled; in a dry run a few, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import report
from gpu_parts import Context, PartSkipped, Row
from gpu_tests_plugin import RECORD

HERE = Path(__file__).parent
ROOT = HERE.parent
PROCESSES = 8
QUIET = ["-q", "-W", "default", "-p", "no:cacheprovider", "-p", "xdist.plugin"]
"""A warning of another version of a library is no failure here, and plugins that happen to be installed stay out."""
DRY = ["tests/kernels/test_back_ends.py", "-k", "test_sums_of_columns", "-n", "0"]


def tests(context: Context) -> None:
    """All of them, in several processes; on a CPU a few."""
    if not (ROOT / "tests").is_dir():
        raise PartSkipped("there are no tests next to the benchmarks")
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    chosen = ["tests/kernels", *map(str, marked), "-n", str(PROCESSES)] if context.on_gpu else DRY
    record = context.folder / "outcomes.json"
    paths = os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.getenv("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *QUIET, "-p", "gpu_tests_plugin", *chosen], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, RECORD: str(record), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    begun, status = time.monotonic(), None
    while status is None:
        try:
            status = process.wait(1)
            state = {0: "all passed", 1: "some failed"}.get(status, f"pytest ended with status {status}")
        except subprocess.TimeoutExpired:
            state = "not all have run"
        if record.is_file():
            found = json.loads(record.read_text(encoding="utf-8"))
            context.emit("tests", {**found, "state": state, "seconds": time.monotonic() - begun})
    if not record.is_file():
        raise RuntimeError(f"pytest ended with status {status} before it ran a test")


def markdown(rows: Sequence[Row]) -> str:
    """A line, and the names of what failed."""
    lines = []
    for row in rows:
        counted = ", ".join(f"{row[outcome]:,} {outcome}" for outcome in ("passed", "failed", "skipped"))
        lines.append(f"{counted} in {row['seconds']:.0f} s ({row['state']}).\n")
        if row["names_of_failed"]:
            lines.append(report.table(["failed"], [[f"`{name}`"] for name in row["names_of_failed"]]))
    return "\n".join(lines)
