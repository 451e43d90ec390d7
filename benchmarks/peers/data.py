"""The activations that all toolkits are timed on: sparse sums of random directions, with noise. Needs torch alone."""

from __future__ import annotations

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
