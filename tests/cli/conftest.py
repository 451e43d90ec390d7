"""A run of seconds, for commands that open one."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae.runs.run import Run
from tests.conftest import make_tiny_config


@pytest.fixture(scope="package")
def run_folder(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny model with a dictionary and a feature store, without an evaluation. Read only."""
    overrides = {"train.tokens": 1280, "features.tokens": 500, "device": "cpu"}
    run = Run(make_tiny_config(tiny_model, text_folder, tmp_path_factory.mktemp("cli") / "run", overrides))
    run.harvest()
    run.train()
    run.features()
    return run.folder
