"""The activation cache: harvest it, open it, and draw shuffled batches from it."""

from __future__ import annotations

from sae.activations.cache import ActivationCache
from sae.activations.tokens import ContextBatch
from sae.numerics.statistics import Statistics

__all__ = ["ActivationCache", "ContextBatch", "Statistics"]
