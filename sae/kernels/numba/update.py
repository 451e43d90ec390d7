"""A feature's gradient, projection, Adam, renormalisation and bfloat16 copy in one pass: no gradient in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import cpu
from sae.kernels.interface import DENSE_ABOVE, AdamStep, FactoredGradient, Gradient, Moments
from sae.kernels.numba import loops
from sae.kernels.numba.codes import array_of
from sae.kernels.threads import in_parts

MOST_FEATURES = 1024
"""Features in one part: few enough for threads that finish early to take more."""


def adam_(
    weight: Float[Tensor, "d_sae d_in"],
    moments: Moments,
    gradient: Gradient,
    step: AdamStep,
    copy: Float[Tensor, "d_sae d_in"] | None = None,
) -> None:
    """Gradients of one sparse term and one block of rows, as of nearly every step; others by PyTorch's operators."""
    tensors = weight, moments.first, moments.second, *(() if copy is None else (copy,))
    dense = gradient.dense is not None or any(term.pattern.density > DENSE_ABOVE for term in gradient.terms)
    if dense or max(len(gradient.terms), len(gradient.blocks)) > 1 or not all(t.is_contiguous() for t in tensors):
        cpu.adam_(weight, moments, gradient, step, copy)
        return
    d_sae, d_in = weight.shape
    places, block = torch.full((d_sae,), -1, device="cpu"), weight.new_empty(0, d_in)
    for part in gradient.blocks:
        places[part.features], block = torch.arange(len(part.features), device="cpu"), part.gradient
    number = array_of(weight).dtype.type
    numbers = (
        number(1 - step.beta1), number(step.beta2), number(1 - step.beta2), number(step.eps),
        number(step.lr / (1 - step.beta1**step.number)), number((1 - step.beta2**step.number) ** 0.5),
        number(1 if step.scale is None else float(step.scale)),
    )  # fmt: skip
    bits = torch.empty(0, d_in, dtype=torch.int16, device="cpu") if copy is None else copy.view(torch.int16)
    arguments = (
        *_by_feature(gradient.terms, weight), places.numpy(), array_of(block), array_of(weight),
        array_of(moments.first), array_of(moments.second), bits.numpy(), numbers, step.unit_rows,
    )  # fmt: skip
    in_parts(lambda start, stop: loops.adam(start, stop, *arguments), d_sae, MOST_FEATURES)


def _by_feature(terms: Sequence[FactoredGradient], like: Tensor) -> tuple[Any, ...]:
    """Offsets, rows and coefficients of the pairs by feature, and the matrix whose rows they add."""
    if not terms:
        offsets = torch.zeros(len(like) + 1, dtype=torch.int64, device="cpu")
        return offsets.numpy(), offsets[:0].numpy(), array_of(like[0, :0]), array_of(like[:0])
    (term,) = terms
    order, rows, offsets = term.pattern.by_feature
    coefficients = term.coefficients.detach().to(like.dtype)[order]
    return offsets.numpy(), rows.numpy(), coefficients.numpy(), array_of(term.rows)
