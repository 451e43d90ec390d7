from __future__ import annotations

from pathlib import Path

import pytest

from sae.activations import ActivationCache
from sae.model.language_model import LanguageModel
from tests.support.effect_case import HEADS, MLP, POST, RESID, make_gemma, make_granite


@pytest.fixture(scope="session")
def held_out(short_documents) -> ActivationCache:
    """Float32, four hook points, 250 held-out tokens of many short documents, the last context ragged. Read only."""
    numbers = {"data.tokens": 600, "data.held_out_tokens": 250, "harvest.shard_contexts": 6}
    return short_documents(6, **numbers, harvest__hooks=[RESID, POST, MLP, HEADS])


@pytest.fixture(scope="session")
def gemma(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny model of another family. Read only."""
    return make_gemma(tmp_path_factory.mktemp("gemma") / "gemma", tiny_model)


@pytest.fixture(scope="session")
def granite(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny model of Llama's blocks. Read only."""
    return make_granite(tmp_path_factory.mktemp("granite") / "granite", tiny_model)
