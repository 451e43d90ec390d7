"""The threshold of BatchTopK and Matryoshka: read off the weights as they are and rows that come next."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures.elementwise import OneThreshold
from sae.kernels.sparse import select_batch_topk

_PAIRS, _LEAST_ROWS, _MOST_ROWS = 65_536, 2048, 4096


def rows_for_threshold(k: int) -> int:
    """Rows whose threshold gives an L0 that is right within 1 or 2 % on others."""
    return min(max(-(-_PAIRS // k), _LEAST_ROWS), _MOST_ROWS)


@torch.no_grad()
def set_threshold_(dictionary: OneThreshold, rows: Float[Tensor, "rows d_in"]) -> None:
    """The smallest activation that the batch rule lets through on these rows: above it k fire on an average one.

    They should not be those of the last steps: on them features fire up to a tenth less than on others in the beginning
    of a training, and a mean over past steps lags behind weights that change (docs/log.md).
    """
    selection = select_batch_topk(rows, dictionary.b_dec, dictionary.W_enc.T, dictionary.b_enc, dictionary.k)
    dictionary.threshold.copy_(selection.values.min().clamp_min(0))
