"""Sets the bounds above which features fire, so that k fire per token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.kernels.sparse import select_batch_topk

_PAIRS, _LEAST_ROWS, _MOST_ROWS = 65_536, 2048, 4096


def rows_for_threshold(k: int) -> int:
    """Number of rows from which a threshold gives an L0 within 1 or 2 % of k on other rows."""
    return min(max(-(-_PAIRS // k), _LEAST_ROWS), _MOST_ROWS)


@torch.no_grad()
def let_k_fire_(dictionary: Dictionary, rows: Float[Tensor, "rows d_in"], k: int) -> None:
    """Let features fire above the smallest activation that is among the k · rows largest ones of these rows.

    To set the threshold of a dictionary in training, the rows should not come from the last steps: early in training,
    features fire up to a tenth less on those than on others, and a mean over past steps lags behind changing weights
    (docs/log.md).
    """
    selection = select_batch_topk(rows, dictionary.centre, dictionary.W_enc.T, dictionary.b_enc, k)
    dictionary.fire_above_(selection.values.min().clamp_min(0))
