"""The reference back end: dense matrices in plain PyTorch, slow and obvious. Tests compare the others with it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.composed import composed_residual
from sae.kernels.interface import AdamStep, FactoredGradient, Gradient, Moments, Selection, Subset
from sae.kernels.pattern import Pattern


def _pre_activations(x: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
    return x @ encoder.T + bias


def _select_in_subset(pre: Tensor, subset: Subset | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if subset is None:
        return None, None
    return (pre[:, subset.features] + subset.penalty).topk(subset.k, dim=-1)


def _from_mask(pre: Tensor, chosen: Tensor) -> tuple[Pattern, Tensor]:
    return Pattern.from_places(chosen.flatten().nonzero()[:, 0], *chosen.shape), pre[chosen]


def select_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    subset: Subset | None = None,
) -> Selection:
    pre = _pre_activations(x, encoder, bias)
    values, features = pre.topk(k, dim=-1)
    return Selection(Pattern.from_indices(features, len(encoder)), values.flatten(), *_select_in_subset(pre, subset))


def select_batch_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    count: int,
    subset: Subset | None = None,
) -> Selection:
    pre = _pre_activations(x, encoder, bias)
    chosen = torch.zeros(pre.numel(), dtype=torch.bool, device=x.device)
    chosen[pre.flatten().topk(count).indices] = True
    pattern, values = _from_mask(pre, chosen.view_as(pre))
    return Selection(pattern, values, *_select_in_subset(pre, subset))


def select_above(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
) -> Selection:
    pre = _pre_activations(x, encoder, bias)
    return Selection(*_from_mask(pre, ~(pre <= threshold)))


def decode(
    pattern: Pattern, values: Float[Tensor, " pairs"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "batch d_in"]:
    return pattern.dense(values) @ decoder


def sampled_product(
    pattern: Pattern, gradient: Float[Tensor, "batch d_in"], decoder: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, " pairs"]:
    return (gradient @ decoder.T)[pattern.rows, pattern.features]


residual = composed_residual(decode, sampled_product)


def feature_sums(term: FactoredGradient) -> Float[Tensor, "d_sae d_in"]:
    return term.pattern.dense(term.coefficients).T @ term.rows


def column_sums(pattern: Pattern, values: Float[Tensor, " pairs"]) -> Float[Tensor, " d_sae"]:
    return pattern.dense(values).sum(0)


def gradient_squares(
    weight: Float[Tensor, "d_sae d_in"], gradient: Gradient, unit_rows: bool
) -> Float[Tensor, " d_sae"]:
    return _whole(weight, gradient, unit_rows).square().sum(-1)


def adam_(
    weight: Float[Tensor, "d_sae d_in"],
    moments: Moments,
    gradient: Gradient,
    step: AdamStep,
    copy: Float[Tensor, "d_sae d_in"] | None = None,
) -> None:
    total = _whole(weight, gradient, step.unit_rows)
    if step.scale is not None:
        total *= step.scale
    moments.first.lerp_(total, 1 - step.beta1)
    moments.second.mul_(step.beta2).addcmul_(total, total, value=1 - step.beta2)
    first = moments.first / (1 - step.beta1**step.number)
    second = moments.second / (1 - step.beta2**step.number)
    weight -= step.lr * first / (second.sqrt() + step.eps)
    if step.unit_rows:
        weight /= weight.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    if copy is not None:
        copy.copy_(weight)


def _whole(weight: Float[Tensor, "d_sae d_in"], gradient: Gradient, unit_rows: bool) -> Float[Tensor, "d_sae d_in"]:
    total = torch.zeros_like(weight) if gradient.dense is None else gradient.dense.clone()
    for term in gradient.terms:
        total += feature_sums(term)
    for block in gradient.blocks:
        total.index_add_(0, block.features, block.gradient)
    if unit_rows:
        total -= (total * weight).sum(-1, keepdim=True) * weight
    return total
