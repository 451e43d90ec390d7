"""What the loop logs of its steps."""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from torch import Tensor

from sae.training.objectives import Losses


class Meter:
    """Means over the steps since the last reading, summed on the device and read once."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps, self._since = 0, time.perf_counter()

    @torch.no_grad()
    def add(self, x: Float[Tensor, "batch d_in"], losses: Losses) -> None:
        fvu = losses.terms["mse"] / x.var(0, correction=0).sum().clamp_min(torch.finfo(x.dtype).tiny)
        for name, value in {"loss": losses.total.detach(), **losses.terms, "fvu": fvu, "l0": losses.l0}.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    def read(self) -> dict[str, float]:
        means = {name: float(value) / self._counts[name] for name, value in self._sums.items()}
        now = time.perf_counter()
        means["tokens_per_second"] = self._steps * self.batch_size / max(now - self._since, 1e-9)
        self._sums, self._counts, self._steps, self._since = {}, {}, 0, now
        return means
