"""A back end in plain PyTorch whose functions can be recorded and replayed as Triton's can.

Each function is one operation to `tests.support.recording`, and reads from tensors what differs from step to step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sae.kernels import reference
from sae.kernels.composed import composed_residual
from sae.kernels.interface import (
    NOTHING,
    AdamStep,
    FactoredGradient,
    Gradient,
    Moments,
    RowGradient,
    Selection,
    Subset,
    adam_numbers,
)
from sae.kernels.pattern import Pattern
from tests.support.recording import one_operation


def select_topk(x: Tensor, encoder: Tensor, bias: Tensor, k: int, subset: Subset | None = None) -> Selection:
    values, features = _largest(x, encoder, bias, k)
    return Selection(
        Pattern.from_indices(features, len(encoder)), values.flatten(), *_in_subset(x, encoder, bias, subset)
    )


def select_batch_topk(x: Tensor, encoder: Tensor, bias: Tensor, count: int, subset: Subset | None = None) -> Selection:
    values, places = _largest_of_all(x, encoder, bias, count)
    return Selection(Pattern.from_places(places, len(x), len(encoder)), values, *_in_subset(x, encoder, bias, subset))


def select_above(x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, capacity: int | None = None) -> Selection:
    if capacity is None:
        return reference.select_above(x, encoder, bias, threshold)
    values, places, total = _above(x, encoder, bias, threshold, capacity)
    return Selection(Pattern.from_places(places, len(x), len(encoder), is_padded=True), values, total=total)


def decode(pattern: Pattern, values: Tensor, decoder: Tensor) -> Tensor:
    return _decode(pattern.features, pattern.offsets, values, decoder)


def sampled_product(pattern: Pattern, gradient: Tensor, decoder: Tensor) -> Tensor:
    return _sampled_product(pattern.features, pattern.offsets, gradient, decoder)


residual = composed_residual(decode, sampled_product)


def feature_sums(term: FactoredGradient) -> Tensor:
    return _feature_sums(term.pattern.features, term.pattern.offsets, term.coefficients, term.rows, term.pattern.d_sae)


def column_sums(pattern: Pattern, values: Tensor) -> Tensor:
    return _column_sums(pattern.features, pattern.offsets, values, pattern.d_sae)


def gradient_squares(weight: Tensor, gradient: Gradient, unit_rows: bool) -> Tensor:
    return _gradient_squares(weight, _parts(gradient), unit_rows)


def adam_(weight: Tensor, moments: Moments, gradient: Gradient, step: AdamStep, copy: Tensor | None = None) -> None:
    numbers = adam_numbers(step) if step.numbers is None else step.numbers
    other = replace(step, lr=0.0, number=0, scale=None, numbers=None)
    _adam_(weight, moments.first, moments.second, _parts(gradient), numbers, step.scale, copy, other)


@one_operation
def _largest(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, features = (x @ encoder.T + bias).topk(k, dim=-1)
    return values, features


@one_operation
def _largest_of_all(x: Tensor, encoder: Tensor, bias: Tensor, count: int) -> tuple[Tensor, Tensor]:
    pre = (x @ encoder.T + bias).flatten()
    places = pre.topk(count).indices.sort().values
    return pre[places], places


@one_operation
def _above(x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    pre = x @ encoder.T + bias
    found = (~(pre <= threshold)).flatten().nonzero()[:, 0]
    values, places = pre.new_full((capacity,), NOTHING), torch.full((capacity,), pre.numel())
    kept = found[:capacity]
    values[: len(kept)], places[: len(kept)] = pre.flatten()[kept], kept
    return values, places, torch.tensor(len(found))


def _in_subset(
    x: Tensor, encoder: Tensor, bias: Tensor, subset: Subset | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if subset is None:
        return None, None
    return _largest(x, encoder[subset.features], bias[subset.features] + subset.penalty, subset.k)


def _pattern(features: Tensor, offsets: Tensor, d_sae: int) -> tuple[Pattern, int]:
    """A pattern without its padding, and its length."""
    pairs = int(offsets[-1])
    return Pattern(features[:pairs], offsets, d_sae), pairs


@one_operation
def _decode(features: Tensor, offsets: Tensor, values: Tensor, decoder: Tensor) -> Tensor:
    pattern, pairs = _pattern(features, offsets, len(decoder))
    return reference.decode(pattern, values[:pairs], decoder)


@one_operation
def _sampled_product(features: Tensor, offsets: Tensor, gradient: Tensor, decoder: Tensor) -> Tensor:
    pattern, pairs = _pattern(features, offsets, len(decoder))
    out = gradient.new_zeros(len(features))
    out[:pairs] = reference.sampled_product(pattern, gradient, decoder)
    return out


@one_operation
def _feature_sums(features: Tensor, offsets: Tensor, coefficients: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    pattern, pairs = _pattern(features, offsets, d_sae)
    return reference.feature_sums(FactoredGradient(pattern, coefficients[:pairs], rows))


@one_operation
def _column_sums(features: Tensor, offsets: Tensor, values: Tensor, d_sae: int) -> Tensor:
    pattern, pairs = _pattern(features, offsets, d_sae)
    return reference.column_sums(pattern, values[:pairs])


def _parts(gradient: Gradient) -> list[list[Tensor | int] | list[Tensor]]:
    terms = [
        [term.pattern.features, term.pattern.offsets, term.coefficients, term.rows, term.pattern.d_sae]
        for term in gradient.terms
    ]
    blocks = [[block.features, block.gradient] for block in gradient.blocks]
    return [*terms, *blocks, [] if gradient.dense is None else [gradient.dense]]


def _gradient(parts: list[list[Tensor]]) -> Gradient:
    dense = sum((_feature_sums(*part) for part in parts if len(part) == 5), start=torch.zeros(()))
    blocks = tuple(RowGradient(*part) for part in parts if len(part) == 2)
    dense = sum((part[0] for part in parts if len(part) == 1), start=dense)
    return Gradient(blocks=blocks, dense=dense if dense.ndim else None)


@one_operation
def _gradient_squares(weight: Tensor, parts: list[list[Tensor]], unit_rows: bool) -> Tensor:
    return reference.gradient_squares(weight, _gradient(parts), unit_rows)


@one_operation
def _adam_(
    weight: Tensor, first: Tensor, second: Tensor, parts: list[list[Tensor]], numbers: Tensor, scale: Tensor | None,
    copy: Tensor | None, step: AdamStep,
) -> None:  # fmt: skip
    """As in `torch.optim.Adam`, with the numbers of `AdamStep.numbers`."""
    lr, correction1, correction2 = numbers.tolist()
    gradient = reference._whole(weight, _gradient(parts), step.unit_rows)
    if scale is not None:
        gradient *= scale
    first.lerp_(gradient, 1 - step.beta1)
    second.mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
    weight -= lr * (first / correction1) / ((second / correction2).sqrt() + step.eps)
    if step.unit_rows:
        weight /= weight.norm(dim=-1, keepdim=True)
    if copy is not None:
        copy.copy_(weight)
