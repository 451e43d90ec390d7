"""Objectives in which a rule sets the number of features that fire: TopK, BatchTopK, Matryoshka."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.architectures import BatchTopK, Matryoshka, TopK
from sae.architectures.elementwise import OneThreshold
from sae.dictionary.base import Dictionary
from sae.kernels.interface import Selection
from sae.kernels.pattern import Pattern
from sae.kernels.sparse import decode, select_batch_topk, select_topk
from sae.training.objectives.auxk import auxk_loss, dead_subset
from sae.training.objectives.common import (
    Losses,
    StepInputs,
    encoder,
    firing,
    objective_of,
    pre_activations_at,
    reconstruction_error,
    with_revival,
)


@objective_of(TopK)
def topk_loss(
    dictionary: TopK, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepInputs
) -> Losses:
    """‖y − ŷ‖² + α · AuxK, with ŷ from the k strongest features.   Gao et al. 2024, §2.3 and appendix A.2."""
    subset = dead_subset(context, x.dtype)
    selection = select_topk(x, *encoder(dictionary), dictionary.k, subset, context.encoder_bf16)
    values = pre_activations_at(dictionary, x, context, selection).relu()
    mse, residual = reconstruction_error(dictionary, selection.pattern, values, target, context)
    return _with_auxk(dictionary, x, residual, context, selection, values, mse)


@objective_of(BatchTopK)
def batch_topk_loss(
    dictionary: BatchTopK, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepInputs
) -> Losses:
    """‖y − ŷ‖² + α · AuxK, with ŷ from the k · batch strongest activations of the batch.   Bussmann et al. 2024, §2."""
    selection, values = _select_over_batch(dictionary, x, context)
    mse, residual = reconstruction_error(dictionary, selection.pattern, values, target, context)
    losses = _with_auxk(dictionary, x, residual, context, selection, values, mse)
    return replace(losses, threshold=values.detach().min())


@objective_of(Matryoshka)
def matryoshka_loss(
    dictionary: Matryoshka, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepInputs
) -> Losses:
    """Mean over prefixes m of ‖y − ŷ_m‖², + α · AuxK, with ŷ_m from BatchTopK's activations below feature m.

    All prefixes are decoded at once: each group of features decodes into its own part of a row, and prefixes are sums
    over groups.   Bussmann et al. 2025, §3.
    """
    selection, values = _select_over_batch(dictionary, x, context)
    groups = len(dictionary.prefix_sizes)
    parts = decode(
        by_groups(selection.pattern, dictionary.prefix_ends), values, dictionary.W_dec, context.decoder_sink
    ).view(len(x), groups, -1)
    residuals = (target - dictionary.b_dec)[:, None] - parts.cumsum(1)
    prefix_errors = residuals.square().sum(-1).mean(0)
    losses = _with_auxk(dictionary, x, residuals[:, -1], context, selection, values, prefix_errors.mean())
    terms = {**losses.terms, "mse": prefix_errors[-1].detach(), "mse_prefixes": prefix_errors.mean().detach()}
    return replace(losses, terms=terms, threshold=values.detach().min())


def by_groups(pattern: Pattern, ends: Int[Tensor, " groups"]) -> Pattern:
    """The pattern with one row per row and group of features; features must ascend in each row."""
    keys = pattern.rows * (pattern.d_sae + 1) + pattern.features
    starts = torch.arange(pattern.batch, device=ends.device)[:, None] * (pattern.d_sae + 1) + ends
    offsets = torch.searchsorted(keys, starts.flatten())
    return Pattern(pattern.features, torch.cat([offsets.new_zeros(1), offsets]), pattern.d_sae)


def _select_over_batch(
    dictionary: OneThreshold, x: Tensor, context: StepInputs
) -> tuple[Selection, Float[Tensor, " pairs"]]:
    subset = dead_subset(context, x.dtype)
    selection = select_batch_topk(x, *encoder(dictionary), dictionary.k, subset, context.encoder_bf16)
    return selection, pre_activations_at(dictionary, x, context, selection).relu()


def _with_auxk(
    dictionary: Dictionary, x: Tensor, residual: Tensor, context: StepInputs, selection: Selection, values: Tensor,
    error: Float[Tensor, ""],
) -> Losses:  # fmt: skip
    """The error plus AuxK, on the dead features in the selection."""
    aux = None
    if selection.subset_values is not None and selection.subset_places is not None:
        aux = auxk_loss(dictionary, x, residual.detach(), context, selection.subset_values, selection.subset_places)
    losses = Losses(error, {"mse": error.detach()}, *firing(selection.pattern, values))
    return with_revival(losses, context, aux=aux)
