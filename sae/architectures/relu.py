"""ReLU: every positive pre-activation fires; an L1 penalty in training keeps them few."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.dictionary import Codes, Dictionary


class ReLU(Dictionary):
    """f = ReLU((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec.

    Bricken et al. 2023, "Towards Monosemanticity: Decomposing Language Models With Dictionary Learning".
    """

    architecture: ClassVar[str] = "relu"
    setting_names: ClassVar[tuple[str, ...]] = ()

    def settings(self) -> dict[str, Any]:
        return {}

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.pre_activations(x).relu()

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        features = self.encode(x)
        widest = int((features > 0).sum(-1).max()) if features.numel() else 0
        values, indices = features.topk(max(widest, 1), dim=-1)
        return Codes(values, indices)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return self.decode(self.encode(x))
