"""ReLU: every positive pre-activation fires; an L1 penalty in training keeps them few."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary import Codes, Dictionary
from sae.kernels.interface import DENSE_ABOVE, Selection
from sae.sparse import select_above

_PROBE = 64


class ReLU(Dictionary):
    """f = ReLU((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec.

    Bricken et al. 2023, "Towards Monosemanticity: Decomposing Language Models With Dictionary Learning".

    An untrained one lets half of the features through; where a few rows show that codes are not sparse, they are
    computed densely.
    """

    architecture: ClassVar[str] = "relu"
    setting_names: ClassVar[tuple[str, ...]] = ()

    def settings(self) -> dict[str, Any]:
        return {}

    def select(self, x: Float[Tensor, "rows d_in"]) -> Selection:
        return select_above(x, self.b_dec, self.W_enc.T, self.b_enc, self.b_enc.new_zeros(self.d_sae))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.pre_activations(x).relu()

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        if not self._is_dense(x):
            return super().encode_sparse(x)
        features = self.encode(x)
        values, indices = features.topk(max(int((features > 0).sum(-1).max()), 1), dim=-1)
        return Codes(values, indices)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return self.decode(self.encode(x)) if self._is_dense(x) else super().forward(x)

    @torch.no_grad()
    def _is_dense(self, x: Tensor) -> bool:
        """Whether more features fire on the first rows than sparse products are good for. Waits for the device."""
        rows = x.reshape(-1, self.d_in)[:_PROBE]
        return len(rows) > 0 and bool((self.pre_activations(rows) > 0).float().mean() > DENSE_ABOVE)
