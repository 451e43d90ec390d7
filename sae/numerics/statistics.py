"""Statistics of a stream of activations: mean, norm, count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_ROUNDING = 1e-12
"""Share of E‖x‖² up to which a variance can be a rounding error of sums in float64."""


@dataclass(frozen=True)
class Statistics:
    """Statistics over the eligible training tokens of one hook point.

    Attributes:
        tokens: number of tokens.
        mean: E[x], in float64: the variance is a difference of squares, and small compared with them if the mean is
            large.
        mean_squared_norm: E‖x‖².
        centred: E‖x − E x‖², measured directly if all rows were in memory; None: computed from the others.
    """

    tokens: int
    mean: Float[Tensor, " d_in"]
    mean_squared_norm: float
    centred: float | None = None

    @staticmethod
    def of(rows: Float[Tensor, "rows d_in"]) -> Statistics:
        """Statistics of rows in memory. The variance is exact for any mean, and 0 only if all rows are equal."""
        rows = rows.detach().double()
        variance = (rows - rows[0]).var(0, correction=0).sum()
        return Statistics(len(rows), rows.mean(0), float(rows.square().sum(1).mean()), float(variance))

    @property
    def variance(self) -> float:
        """E‖x − E x‖², summed over d_in; 0 if it is within the rounding error of the two squares."""
        if self.centred is not None:
            return self.centred
        variance = self.mean_squared_norm - float(self.mean.double().square().sum())
        rounding = max(_ROUNDING, torch.finfo(self.mean.dtype).eps) * self.mean_squared_norm
        return 0.0 if variance <= rounding else variance
