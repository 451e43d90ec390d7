"""What a back end without a pass of its own for it composes from its other functions."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from sae.kernels.pattern import Pattern

Product = Callable[[Pattern, Tensor, Tensor], Tensor]
Residual = Callable[[Pattern, Tensor, Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor]]


def composed_residual(decode: Product, sampled_product: Product) -> Residual:
    """`Kernels.residual` of a back end, from its `decode` and its `sampled_product`."""

    def residual(
        pattern: Pattern,
        values: Float[Tensor, " pairs"],
        decoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_in"] | None,
        target: Float[Tensor, "batch d_in"],
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, " pairs"]]:
        left = target - decode(pattern, values, decoder)
        if bias is not None:
            left -= bias
        return left, sampled_product(pattern, left, decoder)

    return residual
