"""JumpReLU: each feature fires above its own learned threshold."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.architectures.elementwise import Elementwise


class JumpReLU(Elementwise):
    """f = z · [z > θ],  z = ReLU((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec.

    Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders".

    Attributes:
        threshold: θ ≥ 0, `[d_sae]`, in units of the activations.
    """

    architecture = "jumprelu"
    penalty = "l0"
    reads = ("train.l0_coefficient", "train.bandwidth", "train.sparsity_warmup_fraction", "train.k_aux")
    # Thresholds are as large as activations, many times an encoder weight; with the learning rate of the weights they
    # would not reach their values in time (docs/log.md).
    rate_factors = MappingProxyType({"threshold": 10.0})
    non_negative = ("threshold",)

    def __init__(self, d_in: int, d_sae: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(d_in, d_sae, metadata)
        self.threshold = nn.Parameter(torch.zeros(d_sae))

    def bounds(self) -> Float[Tensor, " d_sae"]:
        return self.threshold.detach()

    @torch.no_grad()
    def scale_activations_(self, factor: float | Float[Tensor, " d_sae"]) -> None:
        super().scale_activations_(factor)
        self.threshold.mul_(factor)

    @torch.no_grad()
    def fire_above_(self, bound: Float[Tensor, ""]) -> None:
        self.threshold.fill_(bound)
