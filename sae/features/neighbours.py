"""Features whose decoder directions are most alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PRODUCTS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Neighbours:
    """The nearest other features of each, nearest first.

    Attributes:
        index: which.
        cosine: of the angle between the decoder directions, −1 to 1.
    """

    index: Int[Tensor, "d_sae n"]
    cosine: Float[Tensor, "d_sae n"]


def nearest_neighbours(W_dec: Float[Tensor, "d_sae d_in"], n: int) -> Neighbours:
    """Largest cosines between each decoder row and all others, some features at a time."""
    d_sae = len(W_dec)
    n = min(n, d_sae - 1)
    directions = torch.nn.functional.normalize(W_dec.float(), dim=1)
    rows = max(1, _PRODUCTS_AT_ONCE // d_sae)
    parts = []
    for start in range(0, d_sae, rows):
        cosines = directions[start : start + rows] @ directions.T
        itself = torch.arange(len(cosines), device=cosines.device)
        cosines[itself, start + itself] = -torch.inf
        nearest = cosines.topk(n, dim=1)
        parts.append((nearest.indices, nearest.values.clamp(-1, 1)))
    return Neighbours(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
