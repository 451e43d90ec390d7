"""Sets the threshold of BatchTopK and Matryoshka from the current weights and the next rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures.elementwise import OneThreshold
from sae.kernels.sparse import select_batch_topk

_PAIRS, _LEAST_ROWS, _MOST_ROWS = 65_536, 2048, 4096


def rows_for_threshold(k: int) -> int:
    """Number of rows from which a threshold gives an L0 within 1 or 2 % of k on other rows."""
    return min(max(-(-_PAIRS // k), _LEAST_ROWS), _MOST_ROWS)


@torch.no_grad()
def set_threshold_(dictionary: OneThreshold, rows: Float[Tensor, "rows d_in"]) -> None:
    """Set the threshold to the smallest activation that the batch rule lets through on these rows.

    Above it, k features fire per row on average. The rows should not come from the last steps: early in training,
    features fire up to a tenth less on those than on others, and a mean over past steps lags behind changing weights
    (docs/log.md).
    """
    selection = select_batch_topk(rows, dictionary.b_dec, dictionary.W_enc.T, dictionary.b_enc, dictionary.k)
    dictionary.threshold.copy_(selection.values.min().clamp_min(0))
