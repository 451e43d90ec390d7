"""A plugin of pytest for `gpu_tests.py`: keeps the tests that need a GPU or test kernels, and tells how they go."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

RECORD = "SAE_GPU_TESTS_RECORD"
"""The environment variable that names the file in which outcomes are counted while tests run."""


class Record:
    """Outcomes so far, in the process that collects them from all others."""

    def __init__(self, path: Path) -> None:
        self.path, self.outcomes, self.failed = path, Counter[str](), list[str]()
        self.told = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
            if report.failed:
                self.failed.append(report.nodeid)
        if time.monotonic() - self.told > 1:
            self.write()

    def pytest_sessionfinish(self) -> None:
        self.write()

    def write(self) -> None:
        self.told = time.monotonic()
        counted = {outcome: self.outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({**counted, "names_of_failed": self.failed[:20]}), encoding="utf-8")
        unfinished.replace(self.path)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(Path(os.environ[RECORD])))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU everything is kept."""
    if not torch.cuda.is_available():
        return
    kept = [item for item in items if item.get_closest_marker("gpu") or "kernels" in item.path.parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
