"""Runs of seconds, for commands that open one."""

from __future__ import annotations

from pathlib import Path

import pytest

import sae
from sae.config.file import parse_config
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


@pytest.fixture(scope="package")
def finished(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is complete, with an evaluation. Read only."""
    settings = {
        "out": str(tmp_path_factory.mktemp("runs") / "finished"),
        "model": {"name": str(tiny_model)},
        "data": {
            "source": str(text_folder), "tokens": 1500, "held_out_tokens": 400, "holdout_fraction": 0.25,
            "context_length": 16,
        },
        "harvest": {"hooks": ["blocks.1.hook_resid_pre"]},
        "dictionary": {"d_sae": 64, "k": 4},
        "train": {"batch_size": 64, "pool_tokens": 512, "tokens": 3000},
        "evaluation": {"tokens": 64},
    }  # fmt: skip
    return sae.run(parse_config(settings)).folder
