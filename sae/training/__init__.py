"""The one training loop: batches of activations in, a dictionary out."""

from __future__ import annotations

from sae.training.loop import Interrupted, train
from sae.training.source import BatchSource, IterableSource

__all__ = ["BatchSource", "Interrupted", "IterableSource", "train"]
