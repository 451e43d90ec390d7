"""The one training loop: batches of activations in, a dictionary out."""

from __future__ import annotations

from sae.errors import TrainingInterrupted
from sae.training.joined import JoinedSource
from sae.training.loop import Outcome, train, train_all
from sae.training.recipe import Recipe
from sae.training.source import BatchSource, IterableSource

__all__ = [
    "BatchSource",
    "IterableSource",
    "JoinedSource",
    "Outcome",
    "Recipe",
    "TrainingInterrupted",
    "train",
    "train_all",
]
