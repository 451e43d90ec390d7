"""Base classes of ReLU, Gated, JumpReLU, BatchTopK and Matryoshka: each feature fires independently of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.dictionary.base import Dictionary, check_k
from sae.kernels.interface import DENSE_ABOVE, Selection
from sae.kernels.sparse import select_above

_PROBE = 64


class Elementwise(Dictionary):
    """f_j = activate(z_j) · [z_j > bound_j] with z the pre-activations.

    Any number of features may fire. In an untrained ReLU, half of them do; if the first rows show that codes are not
    sparse, they are computed densely.
    """

    def bounds(self) -> Float[Tensor, " d_sae"]:
        """The pre-activation that a feature must exceed to fire: 0, unless the architecture has thresholds."""
        return self.b_enc.new_zeros(self.d_sae)

    def select(self, x: Float[Tensor, "rows d_in"]) -> Selection:
        return select_above(x, self.centre, self.W_enc.T, self.b_enc, self.bounds())

    def lets_through(self, pre: Float[Tensor, "*batch d_sae"]) -> Bool[Tensor, "*batch d_sae"]:
        return ~(pre <= self.bounds())

    @torch.no_grad()
    def _is_dense(self, x: Tensor) -> bool:
        """Also True if more features fire on the first rows than sparse products pay for. Waits for the device."""
        if super()._is_dense(x):
            return True
        rows = x.reshape(-1, self.d_in)[:_PROBE]
        return len(rows) > 0 and bool((self.pre_activations(rows) > self.bounds()).float().mean() > DENSE_ABOVE)


class OneThreshold(Elementwise):
    """f = z · [z > θ] with z = ReLU of the pre-activations, and one θ for all features.

    Trained by BatchTopK's rule: θ is the smallest activation that the rule lets through on the rows that come next in
    training.

    Attributes:
        k: features per token on average.
        threshold: θ, a single number, not trained by gradient; in units of the activations.
    """

    setting_names = ("k",)
    reads = ("train.k_aux", "train.encoder_dtype")
    batch_threshold = True

    def __init__(self, d_in: int, d_sae: int, *, k: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(d_in, d_sae, metadata)
        check_k(k, d_sae)
        self.k = k
        self.threshold = nn.Parameter(torch.zeros(()), requires_grad=False)

    def bounds(self) -> Float[Tensor, " d_sae"]:
        return self.threshold.expand(self.d_sae)

    @torch.no_grad()
    def scale_activations_(self, factor: float | Float[Tensor, " d_sae"]) -> None:
        """As in every dictionary, but the shared threshold is unchanged if the factor differs between features."""
        super().scale_activations_(factor)
        if not isinstance(factor, Tensor) or factor.ndim == 0:
            self.threshold.mul_(factor)

    @torch.no_grad()
    def fire_above_(self, bound: Float[Tensor, ""]) -> None:
        self.threshold.fill_(bound)
