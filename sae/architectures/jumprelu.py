"""JumpReLU: each feature fires above its own learned threshold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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

    architecture: ClassVar[str] = "jumprelu"
    setting_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, d_in: int, d_sae: int, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(d_in, d_sae, metadata)
        self.threshold = nn.Parameter(torch.zeros(d_sae))

    def settings(self) -> dict[str, Any]:
        return {}

    def bounds(self) -> Float[Tensor, " d_sae"]:
        return self.threshold.detach()

    @torch.no_grad()
    def scale_activations_(self, factor: float | Float[Tensor, " d_sae"]) -> None:
        super().scale_activations_(factor)
        self.threshold.mul_(factor)
