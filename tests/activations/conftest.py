"""A cache of given numbers, written without a language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.dictionary.token_policy import TokenPolicy
from tests.support.fake_cache import Rows, write_fake_cache

WriteCache = Callable[..., ActivationCache]


def write_synthetic_cache(
    folder: Path,
    activations: Tensor,
    tokens: Tensor,
    *,
    scale: Tensor | None = None,
    shard_contexts: int = 4,
    masked_ids: tuple[int, ...] = (0,),
    masked_positions: int = 1,
    **options: Any,
) -> ActivationCache:
    """`activations [rows, d_in]` of the training split at the hook `blocks.0.hook_resid_pre`."""
    return write_fake_cache(
        folder,
        {"train": Rows(activations, tokens, torch.zeros_like(tokens), scale)},
        hook="blocks.0.hook_resid_pre",
        shard_contexts=shard_contexts,
        policy=TokenPolicy(True, masked_positions, masked_ids),
        document_names={"train": ["a"]},
        **options,
    )


@pytest.fixture
def write_cache(tmp_path: Path) -> WriteCache:
    """Writes a synthetic cache into this test's folder."""
    return lambda *args, **options: write_synthetic_cache(tmp_path / "synthetic", *args, **options)
