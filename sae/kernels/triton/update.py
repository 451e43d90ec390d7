"""A feature's gradient, projection, Adam, renormalisation and bfloat16 copy in one program: no gradient in memory."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae.kernels import cpu
from sae.kernels.interface import AdamStep, FactoredGradient, Gradient, Moments, adam_numbers
from sae.kernels.triton.codes import feature_sums, segment_sum
from sae.kernels.triton.tiles import at_once, power_of_two

LARGEST_ROW = 8192
"""Numbers of a feature that one program holds in registers."""


@triton.jit
def _row_gradient(
    w, dense, slots, block,
    rows_0, order_0, places_0, offsets_0, coefficients_0,
    rows_1, order_1, places_1, offsets_1, coefficients_1,
    feature, inner, d_in,
    TERMS: tl.constexpr, DENSE: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The gradient of one feature's row `w`, without its part along the row if UNIT."""
    g = tl.zeros((BLOCK,), tl.float32)
    if DENSE:
        g += tl.load(dense + feature * d_in + inner, mask=inner < d_in, other=0.0).to(tl.float32)
    if TERMS > 0:
        g += segment_sum(
            rows_0, order_0, places_0, offsets_0, coefficients_0, feature, inner, d_in, True, BLOCK, AT_ONCE
        )
    if TERMS > 1:
        g += segment_sum(
            rows_1, order_1, places_1, offsets_1, coefficients_1, feature, inner, d_in, True, BLOCK, AT_ONCE
        )
    if SLOTS:
        slot = tl.load(slots + feature).to(tl.int64)
        there = tl.where(slot >= 0, d_in, 0)
        g += tl.load(block + slot * d_in + inner, mask=inner < there, other=0.0).to(tl.float32)
    if UNIT:
        g -= tl.sum(g * w, 0) * w
    return g


@triton.jit
def _adam_kernel(
    weight, dense, slots, block,
    rows_0, order_0, places_0, offsets_0, coefficients_0,
    rows_1, order_1, places_1, offsets_1, coefficients_1,
    d_in, first, second, copy, scale, numbers, beta1, beta2, eps,
    TERMS: tl.constexpr, DENSE: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    inside = inner < d_in
    at = feature * d_in + inner
    w = tl.load(weight + at, mask=inside, other=0.0)
    g = _row_gradient(
        w, dense, slots, block,
        rows_0, order_0, places_0, offsets_0, coefficients_0, rows_1, order_1, places_1, offsets_1, coefficients_1,
        feature, inner, d_in, TERMS, DENSE, SLOTS, UNIT, BLOCK, AT_ONCE,
    )  # fmt: skip
    if SCALED:
        g *= tl.load(scale)
    lr, correction1, correction2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    m = tl.load(first + at, mask=inside, other=0.0)
    v = tl.load(second + at, mask=inside, other=0.0)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w = w - lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
    if UNIT:
        w = w / tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1.1754943508222875e-38)
    tl.store(weight + at, w, mask=inside)
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    if COPY:
        tl.store(copy + at, w.to(tl.bfloat16), mask=inside)


@triton.jit
def _squares_kernel(
    weight, dense, slots, block,
    rows_0, order_0, places_0, offsets_0, coefficients_0,
    rows_1, order_1, places_1, offsets_1, coefficients_1,
    d_in, out,
    TERMS: tl.constexpr, DENSE: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, BLOCK)
    w = tl.load(weight + feature * d_in + inner, mask=inner < d_in, other=0.0)
    g = _row_gradient(
        w, dense, slots, block,
        rows_0, order_0, places_0, offsets_0, coefficients_0, rows_1, order_1, places_1, offsets_1, coefficients_1,
        feature, inner, d_in, TERMS, DENSE, SLOTS, UNIT, BLOCK, AT_ONCE,
    )  # fmt: skip
    tl.store(out + feature, tl.sum(g * g, 0))


def gradient_squares(
    weight: Float[Tensor, "d_sae d_in"], gradient: Gradient, unit_rows: bool
) -> Float[Tensor, " d_sae"]:
    if weight.shape[1] > LARGEST_ROW:
        return cpu.gradient_squares(weight, gradient, unit_rows)
    pointers, options = _parts(weight, gradient, unit_rows)
    out = weight.new_empty(len(weight))
    with torch.cuda.device_of(weight):
        _squares_kernel[(len(weight),)](*pointers, out, **options)
    return out


def adam_(
    weight: Float[Tensor, "d_sae d_in"],
    moments: Moments,
    gradient: Gradient,
    step: AdamStep,
    copy: Float[Tensor, "d_sae d_in"] | None = None,
) -> None:
    if weight.shape[1] > LARGEST_ROW:
        cpu.adam_(weight, moments, gradient, step, copy)
        return
    pointers, options = _parts(weight, gradient, step.unit_rows)
    numbers = adam_numbers(step).to(weight.device) if step.numbers is None else step.numbers
    with torch.cuda.device_of(weight):
        _adam_kernel[(len(weight),)](
            *pointers, moments.first, moments.second, weight if copy is None else copy,
            weight if step.scale is None else step.scale, numbers, step.beta1, step.beta2, step.eps,
            **options, COPY=copy is not None, SCALED=step.scale is not None,
        )  # fmt: skip


def _parts(weight: Tensor, gradient: Gradient, unit_rows: bool) -> tuple[list[Any], dict[str, Any]]:
    """The kernels' common arguments: the weight, pointers to the parts of its gradient, and which parts exist.

    The kernels take two terms, one block and one dense matrix. Further terms and blocks, which no architecture has, are
    added to the dense matrix. The weight stands in for parts that do not exist.
    """
    d_sae, d_in = weight.shape
    matrices = [] if gradient.dense is None else [gradient.dense]
    matrices += [feature_sums(term) for term in gradient.terms[2:]]
    for block in gradient.blocks[1:]:
        matrices.append(torch.zeros_like(weight).index_add_(0, block.features, block.gradient))
    dense = functools.reduce(torch.add, matrices).contiguous() if matrices else weight
    slots = rows = weight
    if gradient.blocks:
        features, rows = gradient.blocks[0].features, gradient.blocks[0].gradient.contiguous()
        slots = torch.full((d_sae,), -1, dtype=torch.int32, device=weight.device)
        slots[features] = torch.arange(len(features), dtype=torch.int32, device=weight.device)
    terms = [pointer for term in gradient.terms[:2] for pointer in _pointers(term)]
    pointers = [weight, dense, slots, rows, *terms, *[weight] * (10 - len(terms)), d_in]
    options = {
        "TERMS": len(gradient.terms[:2]), "DENSE": bool(matrices), "SLOTS": bool(gradient.blocks), "UNIT": unit_rows,
        "BLOCK": power_of_two(d_in), "AT_ONCE": at_once(weight), "num_warps": 4 if d_in <= 2048 else 8,
    }  # fmt: skip
    return pointers, options


def _pointers(term: FactoredGradient) -> tuple[Tensor, ...]:
    order, rows, offsets = term.pattern.by_feature
    return term.rows.contiguous(), order, rows, offsets, term.coefficients
