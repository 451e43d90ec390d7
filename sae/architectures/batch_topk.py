"""BatchTopK: k features per token on average over a batch, shared out by strength."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.dictionary import Dictionary
from sae.kernels.interface import Selection
from sae.sparse import select_above


class BatchTopK(Dictionary):
    """f = z · [z > θ],  z = ReLU((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec.

    In training the k · batch largest z of each batch fire, whatever the row; θ is the running mean of the smallest of
    them, so that afterwards each token is encoded by itself, with k features on average.

    Bussmann et al. 2024, "BatchTopK Sparse Autoencoders".

    Attributes:
        threshold: θ, a single number, not trained by gradient; in units of x.
    """

    architecture: ClassVar[str] = "batch_topk"
    setting_names: ClassVar[tuple[str, ...]] = ("k",)

    def __init__(self, d_in: int, d_sae: int, *, k: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(d_in, d_sae, metadata)
        if not 1 <= k <= d_sae:
            raise ValueError(f"k={k}: expected 1 ≤ k ≤ d_sae={d_sae}")
        self.k = k
        self.threshold = nn.Parameter(torch.zeros(()), requires_grad=False)

    def settings(self) -> dict[str, Any]:
        return {"k": self.k}

    def select(self, x: Float[Tensor, "rows d_in"]) -> Selection:
        return select_above(x, self.b_dec, self.W_enc.T, self.b_enc, self.threshold.expand(self.d_sae))

    def fold_normalisation_(self, mean: Float[Tensor, " d_in"], scale: float) -> None:
        super().fold_normalisation_(mean, scale)
        self.threshold /= scale
