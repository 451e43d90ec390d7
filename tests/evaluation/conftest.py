"""A cache of the tiny model whose held-out split has many documents, so that standard errors exist."""

from __future__ import annotations

import pytest

from sae.activations import ActivationCache


@pytest.fixture(scope="session")
def many_documents(short_documents) -> ActivationCache:
    """Float32, two hook points, 246 held-out tokens of short documents, the last context ragged. Read only."""
    hooks = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
    return short_documents(8, data__held_out_tokens=246, harvest__hooks=hooks)
