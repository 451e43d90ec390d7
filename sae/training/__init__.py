"""The one training loop: batches of activations in, a dictionary out."""

from __future__ import annotations

from sae.training.loop import TrainingInterrupted, train
from sae.training.source import BatchSource, IterableSource

__all__ = ["BatchSource", "IterableSource", "TrainingInterrupted", "train"]
