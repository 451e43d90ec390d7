"""What training minimises: pure functions of a dictionary and a batch, one per architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary import Dictionary
from sae.kernels.interface import DENSE_ABOVE, Selection, Subset
from sae.kernels.pattern import Pattern
from sae.sparse import GradientSink, decode, encode_at, rows_of, select_above, select_batch_topk, select_topk


@dataclass(frozen=True)
class Context:
    """What an objective needs beside the dictionary and the batch.

    Attributes:
        dead: features that are dead now.
        dead_candidates: their indices as listed a few steps ago, ascending; the only ones AuxK looks at.
        l1_coefficient: weight of the L1 penalty at this step.
        aux_coefficient, k_aux: weight and size of AuxK.
        density: share of features that fired per token a few steps ago, which decides how codes are computed.
        encoder_sink, decoder_sink: where the gradients of the matrices go; None: into `.grad`, dense.
        low: the encoder in bfloat16 for the large product; None: as it is.
    """

    dead: Bool[Tensor, " d_sae"]
    dead_candidates: Int[Tensor, " candidates"]
    l1_coefficient: float
    aux_coefficient: float
    k_aux: int
    density: float = 1.0
    encoder_sink: GradientSink | None = None
    decoder_sink: GradientSink | None = None
    low: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """What an objective found.

    Attributes:
        total: what is minimised.
        terms: its terms, detached, for the log.
        fired: features that fired in the batch.
        l0: mean number of features that fired per token.
        threshold: the smallest activation that was let through, where the architecture learns that.
    """

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    fired: Bool[Tensor, " d_sae"]
    l0: Float[Tensor, ""]
    threshold: Float[Tensor, ""] | None = None


Objective = Callable[[Dictionary, Tensor, Context], Losses]


def mean_squared_error(
    x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖x − x̂‖²."""
    return (x - reconstruction).square().sum(-1).mean()


def topk_loss(dictionary: Dictionary, x: Float[Tensor, "batch d_in"], context: Context) -> Losses:
    """‖x − x̂‖² + α · AuxK, with x̂ from the k strongest features.   Gao et al. 2024, §2.3 and appendix A.2."""
    k, subset = dictionary.settings()["k"], _dead_subset(context, x.dtype)
    selection = select_topk(x, *_encoder(dictionary), k, subset, context.low)
    return _selected_loss(dictionary, x, context, selection)[0]


def batch_topk_loss(dictionary: Dictionary, x: Float[Tensor, "batch d_in"], context: Context) -> Losses:
    """‖x − x̂‖² + α · AuxK, with x̂ from the k · batch strongest activations of the batch.   Bussmann et al. 2024, §2."""
    k, subset = dictionary.settings()["k"], _dead_subset(context, x.dtype)
    selection = select_batch_topk(x, *_encoder(dictionary), k, subset, context.low)
    losses, values = _selected_loss(dictionary, x, context, selection)
    return replace(losses, threshold=values.min())


def relu_loss(dictionary: Dictionary, x: Float[Tensor, "batch d_in"], context: Context) -> Losses:
    """‖x − x̂‖² + λ Σ_j f_j ‖W_dec,j‖, with every positive pre-activation firing.   Bricken et al. 2023."""
    norms = dictionary.W_dec.norm(dim=-1)
    if context.density > DENSE_ABOVE:
        features = _dense_pre_activations(dictionary, x).relu()
        reconstruction = dictionary.decode(features)
        active = features.detach() > 0
        fired, l0 = active.any(0), active.sum(-1).to(x.dtype).mean()
        l1 = (features * norms).sum(-1).mean()
    else:
        selection = select_above(x, *_encoder(dictionary), x.new_zeros(dictionary.d_sae))
        values, reconstruction = _reconstruct(dictionary, x, context, selection)
        fired, l0 = _firing(selection.pattern, values)
        l1 = (values * norms[selection.pattern.features]).sum() / len(x)
    mse = mean_squared_error(x, reconstruction)
    terms = {"mse": mse.detach(), "l1": l1.detach()}
    return Losses(mse + context.l1_coefficient * l1, terms, fired, l0)


def auxk_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    context: Context,
    selection: Selection,
) -> Float[Tensor, ""]:
    """AuxK: ‖e − ê‖², where ê is what the k_aux strongest dead features make of the residual e (no b_dec in either).

    Scaled by min(dead / k_aux, 1), so that it fades as features revive; 0 where none is dead. The residual is a fixed
    target; gradients reach the dead features' encoder and decoder.   Gao et al. 2024, appendix A.2.

    Args:
        x: what the dead features were selected on.
        residual: e, detached.
        selection: holds the dead features that were selected in each row.
    """
    candidates = context.dead_candidates
    assert selection.subset_values is not None and selection.subset_places is not None
    pattern = Pattern.from_indices(selection.subset_places, len(candidates))
    values = encode_at(
        x,
        dictionary.b_dec,
        rows_of(dictionary.W_enc.T, candidates, context.encoder_sink),
        dictionary.b_enc[candidates],
        Selection(pattern, selection.subset_values.flatten()),
    )
    guess = decode(pattern, values.relu(), rows_of(dictionary.W_dec, candidates, context.decoder_sink))
    share = (context.dead[candidates].sum() / context.k_aux).clamp(max=1.0)
    return share * mean_squared_error(residual, guess)


def _selected_loss(
    dictionary: Dictionary, x: Tensor, context: Context, selection: Selection
) -> tuple[Losses, Float[Tensor, " pairs"]]:
    """The objective of TopK and its relatives, and the activations that were let through."""
    values, reconstruction = _reconstruct(dictionary, x, context, selection)
    mse = mean_squared_error(x, reconstruction)
    terms, total = {"mse": mse.detach()}, mse
    if selection.subset_values is not None:
        aux = auxk_loss(dictionary, x, (x - reconstruction).detach(), context, selection)
        terms["aux"] = aux.detach()
        total = total + context.aux_coefficient * aux
    return Losses(total, terms, *_firing(selection.pattern, values)), values.detach()


def _reconstruct(
    dictionary: Dictionary, x: Tensor, context: Context, selection: Selection
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, "batch d_in"]]:
    values = encode_at(x, *_encoder(dictionary), selection, context.encoder_sink).relu()
    return values, decode(selection.pattern, values, dictionary.W_dec, context.decoder_sink) + dictionary.b_dec


def _firing(pattern: Pattern, values: Tensor) -> tuple[Bool[Tensor, " d_sae"], Float[Tensor, ""]]:
    """Which features fired, and how many per token, from one reduction over the pairs."""
    active = (values.detach() > 0).to(values.dtype)
    counts = active.new_zeros(pattern.d_sae).index_add_(0, pattern.features, active)
    return counts > 0, active.sum() / pattern.batch


def _encoder(dictionary: Dictionary) -> tuple[Tensor, Tensor, Tensor]:
    return dictionary.b_dec, dictionary.W_enc.T, dictionary.b_enc


def _dense_pre_activations(dictionary: Dictionary, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """(x − b_dec) W_enc + b_enc as x W_enc + (b_enc − b_dec W_enc).

    Equal but for rounding; b_dec's gradient then costs a matrix times a vector instead of the dense gradient of x.
    """
    return torch.nn.functional.linear(x, dictionary.W_enc.T, dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc)


def _dead_subset(context: Context, dtype: torch.dtype) -> Subset | None:
    """The features that AuxK may use, those that have come to life since they were listed taken out."""
    candidates = context.dead_candidates
    if context.aux_coefficient == 0 or len(candidates) == 0:
        return None
    penalty = torch.zeros(len(candidates), dtype=dtype, device=candidates.device)
    penalty.masked_fill_(~context.dead[candidates], -torch.inf)
    return Subset(candidates, penalty, min(context.k_aux, len(candidates)))


OBJECTIVES: dict[str, Objective] = {"relu": relu_loss, "topk": topk_loss, "batch_topk": batch_topk_loss}
