from __future__ import annotations

from pathlib import Path

import pytest
from causal_case import HEADS, MLP, POST, RESID, make_gemma, make_granite

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.config_file import parse_config
from sae.language_model import LanguageModel


@pytest.fixture(scope="session")
def held_out(
    tiny_model: Path, text_folder: Path, language_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> ActivationCache:
    """Float32, four hook points, 250 held-out tokens of many short documents, the last context ragged. Read only."""
    folder = tmp_path_factory.mktemp("causal")
    (folder / "text").mkdir()
    for path in text_folder.iterdir():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:6]):
            (folder / "text" / f"{path.stem}-{number}.txt").write_text(f"{line}\n", encoding="utf-8")
    settings = {
        "out": str(folder / "run"),
        "model": {"name": str(tiny_model)},
        "data": {
            "source": str(folder / "text"), "tokens": 600, "held_out_tokens": 250, "context_length": 16,
            "holdout_fraction": 0.25,
        },
        "harvest": {"hooks": [RESID, POST, MLP, HEADS], "dtype": "float32", "shard_contexts": 6},
    }  # fmt: skip
    return harvest(parse_config(settings), language_model)


@pytest.fixture(scope="session")
def gemma(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny model of another family. Read only."""
    return make_gemma(tmp_path_factory.mktemp("gemma") / "gemma", tiny_model)


@pytest.fixture(scope="session")
def granite(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny model of Llama's blocks. Read only."""
    return make_granite(tmp_path_factory.mktemp("granite") / "granite", tiny_model)
