"""TopK: exactly the k strongest features reconstruct."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.dictionary.base import Dictionary, check_k
from sae.kernels.interface import Selection
from sae.kernels.sparse import select_topk


class TopK(Dictionary):
    """f = topk_k(ReLU((x − b_dec) W_enc + b_enc)),  x̂ = f W_dec + b_dec.

    If fewer than k pre-activations are positive, fewer than k features fire.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", §2.3.
    """

    architecture = "topk"
    setting_names = ("k",)
    reads = ("train.k_aux", "train.encoder_dtype")

    def __init__(self, d_in: int, d_sae: int, *, k: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(d_in, d_sae, metadata)
        check_k(k, d_sae)
        self.k = k

    def select(self, x: Float[Tensor, "rows d_in"]) -> Selection:
        return select_topk(x, self.centre, self.W_enc.T, self.b_enc, self.k)

    def lets_through(self, pre: Float[Tensor, "*batch d_sae"]) -> Bool[Tensor, "*batch d_sae"]:
        return torch.zeros_like(pre, dtype=torch.bool).scatter(-1, pre.topk(self.k, dim=-1).indices, True)

    def _widest(self, features: Float[Tensor, "*batch d_sae"]) -> int:
        return self.k
