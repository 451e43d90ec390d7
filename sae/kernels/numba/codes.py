"""Products with sparse codes: a row's pairs one after the other, always in the same order, whatever the threads."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sae.kernels import cpu
from sae.kernels.interface import DENSE_ABOVE
from sae.kernels.numba import loops
from sae.kernels.pattern import Pattern
from sae.kernels.threads import in_parts


def decode(
    pattern: Pattern, values: Float[Tensor, " pairs"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "batch d_in"]:
    if pattern.density > DENSE_ABOVE:
        return cpu.decode(pattern, values, decoder)
    out = decoder.new_zeros(pattern.batch, decoder.shape[1])
    pairs = pattern.features.numpy(), pattern.offsets.numpy()
    numbers = array_of(values.to(decoder.dtype)), array_of(decoder), out.numpy()
    in_parts(lambda start, stop: loops.decode(start, stop, *pairs, *numbers), pattern.batch)
    return out


def sampled_product(
    pattern: Pattern, gradient: Float[Tensor, "batch d_in"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " pairs"]:
    if pattern.density > DENSE_ABOVE:
        return cpu.sampled_product(pattern, gradient, decoder)
    out = gradient.new_empty(pattern.pairs)
    pairs = pattern.features.numpy(), pattern.offsets.numpy()
    numbers = array_of(gradient), array_of(decoder), out.numpy()
    in_parts(lambda start, stop: loops.sample(start, stop, *pairs, *numbers), pattern.batch)
    return out


def residual(
    pattern: Pattern,
    values: Float[Tensor, " pairs"],
    decoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_in"] | None,
    target: Float[Tensor, "batch d_in"],
) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, " pairs"]]:
    """A row at a time, so that the second use of its decoder rows finds them in the cache."""
    if pattern.density > DENSE_ABOVE:
        return cpu.residual(pattern, values, decoder, bias, target)
    left, products = torch.empty_like(target, dtype=decoder.dtype), decoder.new_empty(pattern.pairs)
    arguments = (
        pattern.features.numpy(), pattern.offsets.numpy(), array_of(values.to(decoder.dtype)), array_of(decoder),
        array_of(decoder.new_zeros(decoder.shape[1]) if bias is None else bias), array_of(target), left.numpy(),
        products.numpy(),
    )  # fmt: skip
    in_parts(lambda start, stop: loops.residual(start, stop, *arguments), pattern.batch)
    return left, products


def array_of(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as an array, copied if it is not contiguous."""
    return tensor.detach().contiguous().numpy()
