"""Nearest neighbours of features by decoder direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PRODUCTS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Neighbours:
    """The nearest other features of each feature, nearest first.

    Attributes:
        index: the neighbours.
        cosine: cosine between the decoder directions, −1 to 1.
    """

    index: Int[Tensor, "some n"]
    cosine: Float[Tensor, "some n"]


def nearest_neighbours(
    W_dec: Float[Tensor, "d_sae d_in"], n: int, features: Int[Tensor, " some"] | None = None
) -> Neighbours:
    """Largest cosines between the decoder rows of some features (None: all) and all others, one block at a time."""
    d_sae = len(W_dec)
    if features is None:
        features = torch.arange(d_sae, device=W_dec.device)
    n = min(n, d_sae - 1)
    directions = torch.nn.functional.normalize(W_dec.float(), dim=1)
    rows = max(1, _PRODUCTS_AT_ONCE // d_sae)
    parts = []
    for block in features.split(rows):
        cosines = directions[block] @ directions.T
        cosines.scatter_(1, block[:, None], -torch.inf)  # itself
        nearest = cosines.topk(n, dim=1)
        parts.append((nearest.indices, nearest.values.clamp(-1, 1)))
    return Neighbours(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
