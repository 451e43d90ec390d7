"""TopK: exactly the k strongest features reconstruct."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.dictionary import Codes, Dictionary


class TopK(Dictionary):
    """f = topk_k(ReLU((x − b_dec) W_enc + b_enc)),  x̂ = f W_dec + b_dec.

    Where fewer than k pre-activations are positive, fewer than k features fire.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", §2.3.
    """

    architecture: ClassVar[str] = "topk"
    setting_names: ClassVar[tuple[str, ...]] = ("k",)

    def __init__(self, d_in: int, d_sae: int, *, k: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(d_in, d_sae, metadata)
        if not 1 <= k <= d_sae:
            raise ValueError(f"k={k}: expected 1 ≤ k ≤ d_sae={d_sae}")
        self.k = k

    def settings(self) -> dict[str, Any]:
        return {"k": self.k}

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        values, indices = self.pre_activations(x).topk(self.k, dim=-1)
        return Codes(values.relu(), indices)
