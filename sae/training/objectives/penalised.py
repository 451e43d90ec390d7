"""Objectives in which a penalty keeps features from firing: ReLU, Gated, JumpReLU."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import Gated, JumpReLU, ReLU
from sae.dictionary.base import Dictionary
from sae.kernels.interface import DENSE_ABOVE
from sae.kernels.sparse import decode, entries_of, select_above
from sae.training.objectives.auxk import auxk_after
from sae.training.objectives.common import (
    Losses,
    StepInputs,
    encoder,
    firing,
    firing_densely,
    mean_squared_error,
    objective_of,
    pre_activations_at,
    pre_activations_densely,
    reconstruct,
    reconstruct_densely,
    reconstruction_error,
    with_revival,
)


@objective_of(ReLU)
def relu_loss(
    dictionary: ReLU, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepInputs
) -> Losses:
    """‖y − ŷ‖² + λ Σ_j f_j ‖W_dec,j‖, with every positive pre-activation firing.

    Bricken et al. 2023; with decoder norms in the penalty, Anthropic, April 2024 update. In a crosscoder, norms are
    summed over its sites, λ Σ_j f_j Σ_s ‖W_dec,s,j‖: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features
    and Model Diffing".
    """
    norms = dictionary.decoder_norms()
    if context.density > DENSE_ABOVE:
        features = pre_activations_densely(dictionary, x).relu()
        mse, firings = mean_squared_error(target, reconstruct_densely(dictionary, features)), firing_densely(features)
        l1 = (features @ norms).mean()
    else:
        selection = select_above(x, *encoder(dictionary), x.new_zeros(dictionary.d_sae), context.room)
        values = pre_activations_at(dictionary, x, context, selection).relu()
        mse, _ = reconstruction_error(dictionary, selection.pattern, values, target, context)
        firings = firing(selection.pattern, values)
        l1 = (values * entries_of(norms, selection.pattern.features)).sum() / len(x)
    losses = Losses(mse + context.sparsity * l1, {"mse": mse.detach(), "l1": l1.detach()}, *firings)
    return with_revival(losses, context, revival=revival(dictionary, context))


@objective_of(Gated)
def gated_loss(
    dictionary: Gated, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepInputs
) -> Losses:
    """‖y − ŷ‖² + λ Σ_j ReLU(π_j) + ‖y − ŷ_gate‖² + α · AuxK, with ŷ_gate from ReLU(π) and a frozen decoder.

    Rajamanoharan et al. 2024, §3.2, eq. 8. AuxK trains the direction and magnitude of a dead feature, which needs no
    gate, while `revival` opens its gate: a feature opened without this training would be useless and soon close again.
    """
    frozen, b_dec = dictionary.W_dec.detach(), dictionary.b_dec.detach()
    if context.density > DENSE_ABOVE:
        pre = pre_activations_densely(dictionary, x)
        gate = pre.relu()
        features = dictionary.activate(pre, slice(None)) * (pre > 0)
        reconstruction, gate_reconstruction = reconstruct_densely(dictionary, features), gate @ frozen + b_dec
        firings = firing_densely(features)
    else:
        selection = select_above(x, *encoder(dictionary), x.new_zeros(dictionary.d_sae), context.room)
        pattern = selection.pattern
        pre = pre_activations_at(dictionary, x, context, selection)
        gate, values = pre.relu(), dictionary.activate(pre, pattern.features)
        reconstruction = reconstruct(dictionary, pattern, values, context)
        gate_reconstruction = decode(pattern, gate, frozen) + b_dec
        firings = firing(pattern, values)
    mse, l1 = mean_squared_error(target, reconstruction), gate.sum() / len(x)
    gate_mse = mean_squared_error(target.detach(), gate_reconstruction)  # W_skip is frozen too
    terms = {"mse": mse.detach(), "gate_mse": gate_mse.detach(), "l1": l1.detach()}
    losses = Losses(mse + context.sparsity * l1 + gate_mse, terms, *firings)
    aux = auxk_after(dictionary, x, (target - reconstruction).detach(), context)
    return with_revival(losses, context, revival=revival(dictionary, context), aux=aux)


@objective_of(JumpReLU)
def jumprelu_loss(
    dictionary: JumpReLU, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepInputs
) -> Losses:
    """‖y − ŷ‖² + λ · L0, or + λ · (L0 / target − 1)²; + α · AuxK. Straight-through gradients reach the thresholds.

    Pre-activations up to half a bandwidth below a threshold are included, because the threshold's gradient comes from
    there too. Those that are not positive are left out: they all become 0, and moving a threshold lets none through.

    Rajamanoharan et al. 2024, §3 and appendix G (target L0).
    """
    threshold, width = dictionary.threshold, context.bandwidth
    lowest = (threshold.detach() - width / 2).clamp(min=0)
    selection = select_above(x, *encoder(dictionary), lowest, context.room)
    pattern = selection.pattern
    pre = pre_activations_at(dictionary, x, context, selection)
    bounds = entries_of(threshold, pattern.features)
    values = jump(pre, bounds, width)
    l0 = step(pre, bounds, width).sum() / len(x)
    mse, residual = reconstruction_error(dictionary, pattern, values, target, context)
    penalty = l0 if context.target_l0 is None else (l0 / context.target_l0 - 1).square()
    terms = {"mse": mse.detach(), "l0_penalty": penalty.detach()}
    losses = Losses(mse + context.sparsity * penalty, terms, *firing(pattern, values))
    return with_revival(losses, context, aux=auxk_after(dictionary, x, residual, context))


def revival(dictionary: Dictionary, context: StepInputs) -> Float[Tensor, ""] | None:
    """−Σ of the biases of dead features, which it raises until they fire; None if none is dead.

    If every positive pre-activation fires, dead features are negative everywhere, and AuxK has nothing to train. This
    term remains: Anthropic's pre-activation loss (January 2025 update), with a gradient for the bias alone.
    """
    candidates = context.dead_candidates
    if context.aux_coefficient == 0 or len(candidates) == 0:
        return None
    return -(dictionary.b_enc[candidates] * context.dead[candidates]).sum()


def jump(pre: Float[Tensor, " pairs"], bounds: Float[Tensor, " pairs"], width: float) -> Float[Tensor, " pairs"]:
    """z · [z > θ]; ∂/∂θ = −θ/width within half a width of θ.   Rajamanoharan et al. 2024, eq. 11."""
    return _Jump.apply(pre, bounds, width)  # type: ignore[no-any-return]


def step(pre: Float[Tensor, " pairs"], bounds: Float[Tensor, " pairs"], width: float) -> Float[Tensor, " pairs"]:
    """[z > θ]; ∂/∂θ = −1/width within half a width of θ, no gradient for z.   Rajamanoharan et al. 2024, eq. 12."""
    return _Step.apply(pre, bounds, width)  # type: ignore[no-any-return]


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, bounds: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, bounds)
        ctx.width = width
        return pre.masked_fill(pre <= bounds, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, bounds = ctx.saved_tensors
        bounds_gradient = -(bounds / ctx.width) * gradient * _within(pre, bounds, ctx.width)
        return gradient.masked_fill(pre <= bounds, 0), bounds_gradient, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, bounds: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(pre, bounds)
        ctx.width = width
        return (pre > bounds).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, bounds = ctx.saved_tensors
        return None, -(gradient / ctx.width) * _within(pre, bounds, ctx.width), None


def _within(pre: Tensor, bounds: Tensor, width: float) -> Tensor:
    """The rectangle kernel: 1 within half a width of the threshold."""
    return ((pre - bounds).abs() < width / 2).to(pre.dtype)
