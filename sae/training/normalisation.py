"""The one number, and where asked for the mean, that activations are scaled by while training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary import Dictionary
from sae.errors import TrainingError
from sae.training.source import BatchSource


@dataclass(frozen=True)
class Normalisation:
    """x ↦ (x − mean) · scale, after which E‖x‖² = d_in."""

    mean: Float[Tensor, " d_in"]
    scale: float

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return (x - self.mean) * self.scale

    def inverse(self) -> Normalisation:
        """x ↦ x / scale + mean."""
        return Normalisation(-self.mean * self.scale, 1 / self.scale)


def normalisation_of(source: BatchSource, center: bool, device: torch.device) -> Normalisation:
    """From the source's statistics.

    Raises:
        TrainingError: the activations have no size.
    """
    statistics = source.statistics
    mean = statistics.mean if center else torch.zeros_like(statistics.mean)
    square = statistics.mean_squared_norm - (float(statistics.mean.double().square().sum()) if center else 0.0)
    if not math.isfinite(square):
        raise TrainingError(
            f"the activations' mean squared norm is {square}: some are not finite; check them: of a cache with "
            "'sae verify'"
        )
    if square <= 0:
        raise TrainingError("the activations are all equal, so there is nothing to learn: is the hook point right?")
    return Normalisation(mean.to(device), (source.d_in / square) ** 0.5)


def fold_(dictionary: Dictionary, of_input: Normalisation, of_target: Normalisation | None) -> None:
    """Make weights that were trained on normalised activations take raw ones, and give raw targets."""
    like = dictionary.b_dec
    dictionary.fold_normalisation_(
        of_input.mean.to(like),
        of_input.scale,
        None if of_target is None else of_target.mean.to(like),
        None if of_target is None else of_target.scale,
    )
