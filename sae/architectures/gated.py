"""Gated: a gate decides whether a feature fires, a magnitude how strongly; both use one encoder direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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

    architecture: ClassVar[str] = "gated"
    setting_names: ClassVar[tuple[str, ...]] = ()
    bias_names: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag")

    b_gate: nn.Parameter
    b_mag: nn.Parameter

    def __init__(self, d_in: int, d_sae: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(d_in, d_sae, metadata)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    @property
    def b_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.b_gate

    def settings(self) -> dict[str, Any]:
        return {}

    def bounds(self) -> Float[Tensor, " d_sae"]:
        return self.b_gate.new_zeros(self.d_sae)

    @torch.no_grad()
    def shift_pre_activations_(self, shift: Float[Tensor, " d_sae"]) -> None:
        super().shift_pre_activations_(shift)
        self.b_mag.add_(self.r_mag.exp() * shift)

    def activate(
        self, pre: Float[Tensor, "*batch"], features: Int[Tensor, " pairs"] | slice
    ) -> Float[Tensor, "*batch"]:
        b_gate, gain, b_mag = (entries_of(part, features) for part in (self.b_gate, self.r_mag.exp(), self.b_mag))
        return ((pre - b_gate) * gain + b_mag).relu()
