"""Scale and optional shift of the activations during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.errors import TrainingError
from sae.training.joined import JoinedSource
from sae.training.source import BatchSource


@dataclass(frozen=True)
class Normalisation:
    """x ↦ (x − mean) · scale, after which E‖x − E x‖² is the width of x.

    A crosscoder has a scale for each number of a row, equal within a site, after which this holds for every site.
    """

    mean: Float[Tensor, " d_in"]
    scale: float | Float[Tensor, " d_in"]

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return (x - self.mean).mul_(self.scale)

    def times(self, factor: float) -> Normalisation:
        """x ↦ (x − mean) · scale · factor."""
        return Normalisation(self.mean, self.scale * factor)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "scale": self.scale}

    @staticmethod
    def from_state(state: Mapping[str, Any], like: Tensor) -> Normalisation:
        """The inverse of `state_dict`, with tensors of the type and on the device of another one."""
        scale = state["scale"]
        return Normalisation(state["mean"].to(like), scale.to(like) if isinstance(scale, Tensor) else scale)

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
    mean, scale = source.statistics.mean.double(), _scales(source, device)
    if target is None:
        return Normalisation(_on(device, mean if center else torch.zeros_like(mean)), scale), None
    target_mean = target.statistics.mean.double()
    target_shift = target_mean if center else torch.zeros_like(target_mean)
    return Normalisation(_on(device, mean), scale), Normalisation(_on(device, target_shift), _scale(target))


def normalised_mean(source: BatchSource, normalise: Normalisation) -> Float[Tensor, " d_in"]:
    """Mean of the source's activations in units of training."""
    mean = source.statistics.mean.double().to(normalise.mean.device)
    return ((mean - normalise.mean) * normalise.scale).float()


def _scales(source: BatchSource, device: torch.device) -> float | Float[Tensor, " d_in"]:
    """The scale, for a crosscoder that of each site, as often as the site has numbers."""
    if not isinstance(source, JoinedSource):
        return _scale(source)
    scales = torch.tensor([_scale(part) for part in source.parts], dtype=torch.float64)
    return scales.repeat_interleave(torch.tensor(source.site_widths)).float().to(device)


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
        source.scale.to(like) if isinstance(source.scale, Tensor) else source.scale,
        None if target is None else target.mean.to(like),
        None if target is None or isinstance(target.scale, Tensor) else target.scale,
    )


def recorded_scale(normalise: Normalisation, site_widths: Sequence[int]) -> float | list[float]:
    """The scale as metadata holds it: a number, or one for each site of a crosscoder."""
    if not isinstance(normalise.scale, Tensor):
        return normalise.scale
    return [float(part[0]) for part in normalise.scale.split(list(site_widths))]
