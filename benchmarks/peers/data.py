"""The activations that all toolkits are timed on: sparse sums of random directions, with noise. Needs torch alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch


def activations(batches: int, batch: int, d_in: int, seed: int = 0) -> list[torch.Tensor]:
    """Batches `[batch, d_in]` with E‖x‖² = d_in, the same for the same seed.

    Drawn from `torch.Generator().manual_seed(2³¹ + seed)`: no toolkit here begins with a seed from that half.
    """
    generator = torch.Generator().manual_seed((1 << 31) + seed)
    directions = torch.nn.functional.normalize(torch.randn(2 * d_in, d_in, generator=generator), dim=1)
    made = []
    for _ in range(batches):
        fires = torch.rand(batch, 2 * d_in, generator=generator) < 0.02
        codes = fires * torch.rand(batch, 2 * d_in, generator=generator)
        x = codes @ directions + 0.05 * torch.randn(batch, d_in, generator=generator)
        made.append(x * (d_in / x.square().sum(1).mean()) ** 0.5)
    return made


class Stream:
    """Activations without end, made on the device that uses them: batch n is the same whenever it is asked for.

    Each row is a sparse sum of eight unit directions per dimension, with noise. The frequency of direction j falls as
    1 / (j + 20); some 24 are in a row. E‖x‖² = d_in. On one machine, all toolkits get the same numbers.
    """

    def __init__(self, batch: int, d_in: int, device: str) -> None:
        self.batch, self.d_in, self.device = batch, d_in, device
        count = 8 * d_in
        directions = torch.randn(count, d_in, generator=torch.Generator().manual_seed(1 << 31))
        self.directions = torch.nn.functional.normalize(directions, dim=1).to(device)
        frequency = 1 / (torch.arange(count) + 20.0)
        self.frequency = (frequency * 24 / frequency.sum()).clamp(max=0.5).to(device)
        self.scale = 1.0
        self.scale = float((d_in / self[1 << 20].square().sum(1).mean()) ** 0.5)

    def __getitem__(self, number: int) -> torch.Tensor:
        """Batch `[batch, d_in]` of this number."""
        generator = torch.Generator(self.device).manual_seed((1 << 31) + 1 + number)
        shape = self.batch, len(self.frequency)
        fires = torch.rand(shape, generator=generator, device=self.device) < self.frequency
        codes = torch.rand(shape, generator=generator, device=self.device).add_(0.25).mul_(fires)
        noise = torch.randn(self.batch, self.d_in, generator=generator, device=self.device)
        return (codes @ self.directions + 0.02 * noise) * self.scale

    def __iter__(self) -> Iterator[torch.Tensor]:
        """From batch 0."""
        return map(self.__getitem__, itertools.count())
