"""The activation cache: harvest it, open it, verify it, draw shuffled batches from it."""

from __future__ import annotations

from sae.activations.cache import ActivationCache, ContextBatch, Statistics, verify

__all__ = ["ActivationCache", "ContextBatch", "Statistics", "verify"]
