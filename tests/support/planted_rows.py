"""Sparse sums of planted directions, around any mean. Directions and rows come from NumPy's streams, tagged by purpose,
so that no torch generator that training may begin with gives the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_DIRECTIONS, _ROWS, _STATISTICS = 101, 102, 103


@dataclass(frozen=True)
class PlantedRows:
    """Each row: `k` of `count` unit directions with weights in [0.5, 1.5), and noise.

    Attributes:
        share: of ‖mean‖² in E‖x‖²: the rows' own mean is taken out and another one added.
    """

    seed: int
    d_in: int = 32
    count: int = 64
    k: int = 4
    share: float = 0.0
    noise: float = 0.05

    def rows(self, number: int, stream: int = _ROWS, stream_number: int = 0) -> Tensor:
        """`[number, d_in]`, the same for the same arguments."""
        return (self._sums(number, stream, stream_number) + self._shift).float()

    def batches(self, number: int, rows: int) -> list[Tensor]:
        return list(self.rows(number * rows).split(rows))

    def held_out(self, number: int = 4096) -> Tensor:
        return self.rows(number, stream_number=1)

    @cached_property
    def directions(self) -> Tensor:
        drawn = np.random.default_rng([_DIRECTIONS, self.seed]).standard_normal((self.count, self.d_in))
        return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))

    @cached_property
    def _shift(self) -> Tensor:
        sample = self._sums(16_384, _STATISTICS, 0)
        mean, variance = sample.mean(0), float(sample.var(0, correction=0).sum())
        along = torch.from_numpy(np.random.default_rng([_DIRECTIONS, self.seed, 1]).standard_normal(self.d_in))
        return along / along.norm() * (variance * self.share / (1 - self.share)) ** 0.5 - mean

    def _sums(self, number: int, stream: int, stream_number: int) -> Tensor:
        random = np.random.default_rng([stream, self.seed, stream_number])
        chosen = np.argpartition(random.random((number, self.count)), self.k, axis=1)[:, : self.k]
        weights = np.zeros((number, self.count))
        np.put_along_axis(weights, chosen, 0.5 + random.random((number, self.k)), axis=1)
        noise = self.noise * random.standard_normal((number, self.d_in))
        return torch.from_numpy(weights) @ self.directions + torch.from_numpy(noise)


def fvu(dictionary: torch.nn.Module, x: Tensor) -> float:
    """In float64: of rows with a large mean float32 keeps few digits of the variance."""
    x = x.double()
    error = x - dictionary(x.float()).double()
    return float(error.square().sum() / (x - x.mean(0)).square().sum())
