"""A cache of the tiny model whose held-out split has many documents, so that standard errors exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.config_file import parse_config
from sae.language_model import LanguageModel


@pytest.fixture(scope="session")
def many_documents(
    tiny_model: Path, text_folder: Path, language_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> ActivationCache:
    """Float32, two hook points, 246 held-out tokens of short documents, the last context ragged. Read only."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "text").mkdir()
    for path in text_folder.iterdir():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:8]):
            (folder / "text" / f"{path.stem}-{number}.txt").write_text(f"{line}\n", encoding="utf-8")
    settings = {
        "out": str(folder / "run"),
        "model": {"name": str(tiny_model)},
        "data": {
            "source": str(folder / "text"), "tokens": 1000, "held_out_tokens": 246, "context_length": 16,
            "holdout_fraction": 0.25,
        },
        "harvest": {
            "hooks": ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"], "dtype": "float32", "shard_contexts": 8,
        },
    }  # fmt: skip
    return harvest(parse_config(settings), language_model)
