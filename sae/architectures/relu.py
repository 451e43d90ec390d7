"""ReLU: every positive pre-activation fires; an L1 penalty in training keeps codes sparse."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from sae.architectures.elementwise import Elementwise


class ReLU(Elementwise):
    """f = ReLU((x − b_dec) W_enc + b_enc),  x̂ = f W_dec + b_dec.

    Bricken et al. 2023, "Towards Monosemanticity: Decomposing Language Models With Dictionary Learning"; in the form of
    Anthropic's April 2024 update: decoder norms are free during training, and the penalty includes them.
    """

    architecture: ClassVar[str] = "relu"
    setting_names: ClassVar[tuple[str, ...]] = ()
    unit_decoder: ClassVar[bool] = False

    def settings(self) -> dict[str, Any]:
        return {}

    def bounds(self) -> Float[Tensor, " d_sae"]:
        return self.b_enc.new_zeros(self.d_sae)
