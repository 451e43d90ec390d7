"""Building blocks of all objectives, and their registry, which each enters by `@objective_of`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.kernels.interface import Room, Selection
from sae.kernels.pattern import Pattern
from sae.kernels.sparse import GradientSink, decode, encode_at, squared_error


@dataclass(frozen=True)
class StepInputs:
    """Inputs of an objective in addition to the dictionary and the batch.

    Attributes:
        dead: features that are dead now.
        dead_candidates: indices of dead features as listed a few steps ago, ascending; only these are revived.
        sparsity: weight of the penalty on firing at this step, if the architecture has one.
        aux_coefficient, k_aux: weight and number of features of the term that revives dead features.
        density: share of features that fired per token a few steps ago; decides how codes are computed.
        encoder_sink, decoder_sink: where the gradients of the matrices go; None: into `.grad`, dense.
        encoder_bf16: the encoder in bfloat16 for the large product; None: the encoder itself is used.
        target_l0: features per token that an L0 penalty aims at; None: the penalty is L0 itself.
        bandwidth: width of the window around a trained threshold in which the threshold has a gradient.
        room: room for the pairs above thresholds; None: as many as there are.
    """

    dead: Bool[Tensor, " d_sae"]
    dead_candidates: Int[Tensor, " candidates"]
    sparsity: float | Float[Tensor, ""]
    aux_coefficient: float
    k_aux: int
    density: float = 1.0
    encoder_sink: GradientSink | None = None
    decoder_sink: GradientSink | None = None
    encoder_bf16: Tensor | None = None
    target_l0: int | None = None
    bandwidth: float = 1.0
    room: Room | None = None


@dataclass(frozen=True)
class Losses:
    """Result of an objective.

    Attributes:
        total: the loss to minimise.
        terms: its terms without their weights, detached, and other values to log.
        counts: number of tokens of the batch on which each feature fired.
        l0: mean number of features that fired per token.
        threshold: the smallest activation that was let through, if the architecture has a learned threshold.
        revived: the part of `total` that revives dead features, detached. It appears when features die, and then
            `total` rises although the reconstruction improves.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    counts: Float[Tensor, " d_sae"]
    l0: Float[Tensor, ""]
    threshold: Float[Tensor, ""] | None = None
    revived: Float[Tensor, ""] | None = None


def with_revival(losses: Losses, context: StepInputs, **terms: Float[Tensor, ""] | None) -> Losses:
    """Add the terms that revive dead features, by their names in the log. A term is None if no feature is dead."""
    for name, term in terms.items():
        if term is not None:
            weighted = context.aux_coefficient * term
            losses = replace(
                losses,
                total=losses.total + weighted,
                terms={**losses.terms, name: term.detach()},
                revived=weighted.detach() + (0 if losses.revived is None else losses.revived),
            )
    return losses


Kind = TypeVar("Kind", bound=Dictionary)
Objective = Callable[[Kind, Tensor, Tensor, StepInputs], Losses]
"""(dictionary, input `[batch, d_in]`, target `[batch, d_out]`, context) → losses; pure."""
OBJECTIVES: dict[str, Objective[Any]] = {}
"""Objectives by the names of their architectures."""


def objective_of(architecture: type[Kind]) -> Callable[[Objective[Kind]], Objective[Kind]]:
    """Decorator that makes a function the objective of an architecture.

    It is given what a skip connection leaves of the target, y − x W_skip, so that W_skip gets its gradient through the
    target.
    """

    def register(objective: Objective[Kind]) -> Objective[Kind]:
        @functools.wraps(objective)
        def after_skip(dictionary: Kind, x: Tensor, target: Tensor, context: StepInputs) -> Losses:
            left = target if dictionary.W_skip is None else target - x @ dictionary.W_skip
            return objective(dictionary, x, left, context)

        OBJECTIVES[architecture.architecture] = after_skip
        return after_skip

    return register


def mean_squared_error(
    target: Float[Tensor, "batch d_out"], reconstruction: Float[Tensor, "batch d_out"]
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖y − ŷ‖²."""
    return (target - reconstruction).square().sum(-1).mean()


def pre_activations_at(
    dictionary: Dictionary, x: Float[Tensor, "batch d_in"], context: StepInputs, selection: Selection
) -> Float[Tensor, " pairs"]:
    """Pre-activations at the pairs of `selection`, differentiable in the dictionary."""
    return encode_at(x, *encoder(dictionary), selection, context.encoder_sink)


def reconstruct(
    dictionary: Dictionary, pattern: Pattern, values: Float[Tensor, " pairs"], context: StepInputs
) -> Float[Tensor, "batch d_out"]:
    """Σ of values · decoder rows, plus b_dec."""
    return decode(pattern, values, dictionary.W_dec, context.decoder_sink) + dictionary.b_dec


def reconstruct_densely(dictionary: Dictionary, features: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_out"]:
    """`reconstruct` from a dense matrix."""
    return features @ dictionary.W_dec + dictionary.b_dec


def reconstruction_error(
    dictionary: Dictionary,
    pattern: Pattern,
    values: Float[Tensor, " pairs"],
    target: Float[Tensor, "batch d_out"],
    context: StepInputs,
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:
    """`mean_squared_error` of `reconstruct`, and y − ŷ without a gradient."""
    return squared_error(pattern, values, dictionary.W_dec, dictionary.b_dec, target, context.decoder_sink)


def firing(pattern: Pattern, values: Float[Tensor, " pairs"]) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, ""]]:
    """Number of tokens on which each feature fired, and mean L0, from one reduction over the pairs."""
    active = (values.detach() > 0).to(values.dtype)
    counts = active.new_zeros(pattern.d_sae).index_add_(0, pattern.features, active)
    return counts, active.sum() / pattern.batch


def firing_densely(features: Float[Tensor, "batch d_sae"]) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, ""]]:
    """`firing` for a dense matrix."""
    active = features.detach() > 0
    return active.sum(0).to(features.dtype), active.sum(-1).to(features.dtype).mean()


def encoder(dictionary: Dictionary) -> tuple[Tensor, Tensor, Tensor]:
    """What is subtracted from x, the encoder by feature, and its bias, as arguments for `sae.kernels.sparse`."""
    return dictionary.centre, dictionary.W_enc.T, dictionary.b_enc


def pre_activations_densely(dictionary: Dictionary, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """(x − b_dec) W_enc + b_enc as x W_enc + (b_enc − b_dec W_enc); of a transcoder, x W_enc + b_enc.

    Equal up to rounding; b_dec's gradient then costs a matrix times a vector instead of the dense gradient of x.
    """
    is_centred = dictionary.frame.d_out is None
    bias = dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc if is_centred else dictionary.b_enc
    return torch.nn.functional.linear(x, dictionary.W_enc.T, bias)
