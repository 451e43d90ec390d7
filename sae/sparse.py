"""Linear algebra on sparse codes: values and indices in, dense vectors out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def decode_sparse(
    values: Float[Tensor, "*batch k"], indices: Int[Tensor, "*batch k"], W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "*batch d_in"]:
    """Σ_j values_j · W_dec[indices_j]: the product with W_dec that touches only the active rows.

    Differentiable in `values` and `W_dec`.
    """
    batch, k = values.shape[:-1], values.shape[-1]
    if k == 0 or values.numel() == 0:
        return values.new_zeros(*batch, W_dec.shape[1])
    summed = torch.nn.functional.embedding_bag(
        indices.reshape(-1, k), W_dec, per_sample_weights=values.reshape(-1, k), mode="sum"
    )
    return summed.reshape(*batch, W_dec.shape[1])
