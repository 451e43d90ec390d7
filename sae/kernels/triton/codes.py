"""Products with sparse codes: one program per row or per feature. No atomics, so results repeat bit for bit."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sae.kernels.composed import composed_residual
from sae.kernels.interface import FactoredGradient
from sae.kernels.pattern import Pattern
from sae.kernels.triton.tiles import at_once, power_of_two

LARGEST_BLOCK = 1024


@triton.jit
def segment_sum(
    matrix, order, places, offsets, coefficients, segment, inner, d_in,
    ORDERED: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Σ over the pairs of a segment of coefficient · matrix[place], at the numbers `inner` of the row."""
    start = tl.load(offsets + segment)
    stop = tl.load(offsets + segment + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, stop, AT_ONCE):
        for next_one in tl.static_range(AT_ONCE):  # pyright: ignore[reportGeneralTypeIssues]
            pair = first + next_one
            there = pair < stop
            place = tl.load(places + pair, mask=there, other=0)
            at = tl.load(order + pair, mask=there, other=0) if ORDERED else pair
            coefficient = tl.load(coefficients + at, mask=there, other=0.0).to(tl.float32)
            reach = tl.where(there, d_in, 0)
            total += coefficient * tl.load(matrix + place * d_in + inner, mask=inner < reach, other=0.0).to(tl.float32)
    return total


@triton.jit
def _weighted_sum_kernel(
    matrix, order, places, offsets, coefficients, out, d_in,
    ORDERED: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ over the pairs of segment i of coefficient · matrix[place]."""
    segment = tl.program_id(0).to(tl.int64)
    inner = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = segment_sum(matrix, order, places, offsets, coefficients, segment, inner, d_in, ORDERED, BLOCK, AT_ONCE)
    tl.store(out + segment * d_in + inner, total, mask=inner < d_in)


@triton.jit
def _dots_kernel(gradient, decoder, features, offsets, out, d_in, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """out[pair] = gradient[row] · decoder[feature] for all pairs of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + row)
    stop = tl.load(offsets + row + 1)
    inner = tl.arange(0, BLOCK)
    if BLOCKS == 1:
        left = tl.load(gradient + row * d_in + inner, mask=inner < d_in, other=0.0).to(tl.float32)
        for pair in range(start, stop):
            feature = tl.load(features + pair)
            right = tl.load(decoder + feature * d_in + inner, mask=inner < d_in, other=0.0).to(tl.float32)
            tl.store(out + pair, tl.sum(left * right, 0))
    else:
        for pair in range(start, stop):
            feature = tl.load(features + pair)
            total = tl.zeros((BLOCK,), tl.float32)
            for block in range(BLOCKS):
                at = block * BLOCK + inner
                left = tl.load(gradient + row * d_in + at, mask=at < d_in, other=0.0).to(tl.float32)
                right = tl.load(decoder + feature * d_in + at, mask=at < d_in, other=0.0).to(tl.float32)
                total += left * right
            tl.store(out + pair, tl.sum(total, 0))


def decode(
    pattern: Pattern, values: Float[Tensor, " pairs"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "batch d_in"]:
    out = values.new_empty(pattern.batch, decoder.shape[1])
    return _weighted_sums(decoder.contiguous(), None, pattern.features, pattern.offsets, values, out)


def sampled_product(
    pattern: Pattern, gradient: Float[Tensor, "batch d_in"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " pairs"]:
    out = gradient.new_zeros(pattern.pairs) if pattern.is_padded else gradient.new_empty(pattern.pairs)
    d_in = decoder.shape[1]
    block = min(power_of_two(d_in), LARGEST_BLOCK)
    with torch.cuda.device_of(gradient):
        _dots_kernel[(pattern.batch,)](
            gradient.contiguous(), decoder.contiguous(), pattern.features, pattern.offsets, out, d_in,
            BLOCK=block, BLOCKS=triton.cdiv(d_in, block),
        )  # fmt: skip
    return out


residual = composed_residual(decode, sampled_product)


def feature_sums(term: FactoredGradient) -> Float[Tensor, "d_sae d_in"]:
    return _sums_by_feature(term.pattern, term.coefficients, term.rows.contiguous())


def column_sums(pattern: Pattern, values: Float[Tensor, " pairs"]) -> Float[Tensor, " d_sae"]:
    """`torch.index_add` would use atomics, in a different order each time."""
    return _sums_by_feature(pattern, values, values.new_ones(pattern.batch, 1)).view(-1)


def _sums_by_feature(pattern: Pattern, coefficients: Tensor, matrix: Tensor) -> Tensor:
    order, rows, offsets = pattern.by_feature
    return _weighted_sums(matrix, order, rows, offsets, coefficients, matrix.new_empty(pattern.d_sae, matrix.shape[1]))


def _weighted_sums(
    matrix: Tensor, order: Tensor | None, places: Tensor, offsets: Tensor, coefficients: Tensor, out: Tensor
) -> Tensor:
    """out[i] = Σ over the pairs of segment i of coefficient · matrix[place].

    `order` has the position of each pair's coefficient; None if they are in the pairs' order.
    """
    d_in = matrix.shape[1]
    block = min(power_of_two(d_in), LARGEST_BLOCK)
    with torch.cuda.device_of(out):
        _weighted_sum_kernel[(len(out), triton.cdiv(d_in, block))](
            matrix, places if order is None else order, places, offsets, coefficients, out, d_in,
            ORDERED=order is not None, BLOCK=block, AT_ONCE=at_once(out),
        )  # fmt: skip
    return out
