"""Gated: a gate decides whether a feature fires, a magnitude how strongly; both use one encoder direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.architectures.elementwise import Elementwise
from sae.kernels.sparse import entries_of


class Gated(Elementwise):
    """f = [π > 0] · ReLU(e^r_mag · (π − b_gate) + b_mag),  π = (x − b_dec) W_enc + b_gate,  x̂ = f W_dec + b_dec.

    Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated Sparse Autoencoders", §3.2.

    Attributes:
        b_gate: bias of the gate, `[d_sae]`; also available as `b_enc`.
        b_mag: bias of the magnitude, `[d_sae]`.
        r_mag: logarithm of the magnitude's gain over the gate, `[d_sae]`.
    """

    architecture = "gated"
    bias_names = ("b_gate", "b_mag")
    penalty = "l1"
    reads = ("train.l1_coefficient", "train.sparsity_warmup_fraction", "train.k_aux")

    b_gate: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, d_in: int, d_sae: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(d_in, d_sae, metadata)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    @property
    def b_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.b_gate

    def magnitude_encoder(
        self, rows: Float[Tensor, "some d_in"], features: Int[Tensor, " some"] | slice
    ) -> tuple[Float[Tensor, "some d_in"], Float[Tensor, " some"]]:
        return rows * self.r_mag[features].exp()[:, None], self.b_mag[features]

    @torch.no_grad()
    def shift_pre_activations_(self, shift: Float[Tensor, " d_sae"]) -> None:
        super().shift_pre_activations_(shift)
        self.b_mag.add_(self.r_mag.exp() * shift)

    def activate(
        self, pre: Float[Tensor, "*batch"], features: Int[Tensor, " pairs"] | slice
    ) -> Float[Tensor, "*batch"]:
        b_gate, gain, b_mag = (entries_of(part, features) for part in (self.b_gate, self.r_mag.exp(), self.b_mag))
        return ((pre - b_gate) * gain + b_mag).relu()
