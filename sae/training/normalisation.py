"""Scale and optional shift of the activations during training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.errors import TrainingError
from sae.training.source import BatchSource


@dataclass(frozen=True)
class Normalisation:
    """x ↦ (x − mean) · scale, after which E‖x − E x‖² is the width of x."""

    mean: Float[Tensor, " d_in"]
    scale: float

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return (x - self.mean).mul_(self.scale)

    def times(self, factor: float) -> Normalisation:
        """x ↦ (x − mean) · scale · factor."""
        return Normalisation(self.mean, self.scale * factor)

    def inverse(self) -> Normalisation:
        """x ↦ x / scale + mean."""
        return Normalisation(-self.mean * self.scale, 1 / self.scale)


def normalisations_of(
    source: BatchSource, target: BatchSource | None, center: bool, device: torch.device
) -> tuple[Normalisation, Normalisation | None]:
    """Normalisations of the input and, for a transcoder, of the target, from the sources' statistics.

    The scale comes from the variance, whether or not the mean is subtracted, so that a constant vector in the data
    changes nothing. A transcoder subtracts nothing from its input before encoding, so its input always loses its mean,
    and `center` is about the target alone.

    Raises:
        TrainingError: the activations are not finite, or have no variance.
    """
    mean, scale = source.statistics.mean.double(), _scale(source)
    if target is None:
        return Normalisation(_on(device, mean if center else torch.zeros_like(mean)), scale), None
    target_mean = target.statistics.mean.double()
    target_shift = target_mean if center else torch.zeros_like(target_mean)
    return Normalisation(_on(device, mean), scale), Normalisation(_on(device, target_shift), _scale(target))


def normalised_mean(source: BatchSource, normalise: Normalisation) -> Float[Tensor, " d_in"]:
    """Mean of the source's activations in units of training."""
    mean = source.statistics.mean.double().to(normalise.mean.device)
    return ((mean - normalise.mean) * normalise.scale).float()


def _scale(source: BatchSource) -> float:
    statistics = source.statistics
    if not math.isfinite(statistics.mean_squared_norm):
        raise TrainingError(
            f"the activations' mean squared norm is {statistics.mean_squared_norm}: some are not finite; check a cache "
            "with 'sae verify'"
        )
    if statistics.variance <= 0:
        raise TrainingError("the activations are all equal, so there is nothing to learn: is the hook point right?")
    return (source.d_in / statistics.variance) ** 0.5


def _on(device: torch.device, mean: Float[Tensor, " d_in"]) -> Float[Tensor, " d_in"]:
    return mean.float().to(device)


def fold_(dictionary: Dictionary, source: Normalisation, target: Normalisation | None) -> None:
    """Make weights trained on normalised activations take raw inputs and reconstruct raw targets."""
    like = dictionary.b_dec
    dictionary.fold_normalisation_(
        source.mean.to(like),
        source.scale,
        None if target is None else target.mean.to(like),
        None if target is None else target.scale,
    )
