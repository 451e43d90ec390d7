"""AuxK: dead features learn to reconstruct the residual, until they fire again."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.kernels.interface import Selection, Subset
from sae.kernels.pattern import Pattern
from sae.kernels.sparse import encode_at, rows_of, select_topk, squared_error
from sae.training.objectives.common import StepInputs


def auxk_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    context: StepInputs,
    values: Float[Tensor, "batch k_aux"],
    places: Int[Tensor, "batch k_aux"],
) -> Float[Tensor, ""]:
    """AuxK: ‖e − ê‖², with ê the reconstruction of the residual e by the k_aux strongest dead features (without b_dec).

    Scaled by min(dead / k_aux, 1), so that it fades as features revive; 0 if none is dead. The residual is a fixed
    target; gradients reach the dead features' encoder and decoder.   Gao et al. 2024, appendix A.2.

    Args:
        x: inputs on which the dead features were selected.
        residual: e, detached.
        values: pre-activations by `dead_encoder` of the dead features selected in each row.
        places: their positions in `context.dead_candidates`.
    """
    candidates = context.dead_candidates
    pattern = Pattern.from_indices(places, len(candidates))
    pre = encode_at(x, dictionary.centre, *dead_encoder(dictionary, context), Selection(pattern, values.flatten()))
    error, _ = squared_error(
        pattern, pre.relu(), rows_of(dictionary.W_dec, candidates, context.decoder_sink), None, residual
    )
    share = (context.dead[candidates].sum() / context.k_aux).clamp(max=1.0)
    return share * error


def dead_encoder(
    dictionary: Dictionary, context: StepInputs
) -> tuple[Float[Tensor, "candidates d_in"], Float[Tensor, " candidates"]]:
    """Encoder rows and biases of the dead features.

    If there is a gate, they are those of the magnitude: the gate of a dead feature is closed on every row.
    """
    candidates = context.dead_candidates
    return dictionary.magnitude_encoder(rows_of(dictionary.W_enc.T, candidates, context.encoder_sink), candidates)


def dead_subset(context: StepInputs, dtype: torch.dtype) -> Subset | None:
    """The features that AuxK may use: the candidates, except those that fired since they were listed."""
    candidates = context.dead_candidates
    if context.aux_coefficient == 0 or len(candidates) == 0:
        return None
    penalty = torch.zeros(len(candidates), dtype=dtype, device=candidates.device)
    penalty.masked_fill_(~context.dead[candidates], -torch.inf)
    return Subset(candidates, penalty, min(context.k_aux, len(candidates)))


def auxk_after(
    dictionary: Dictionary, x: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_out"], context: StepInputs
) -> Float[Tensor, ""] | None:
    """`auxk_loss` if the objective's own selection did not cover the dead features; None if none is dead."""
    subset = dead_subset(context, x.dtype)
    if subset is None:
        return None
    rows, biases = dead_encoder(dictionary, context)
    selection = select_topk(x, dictionary.centre, rows, biases + subset.penalty, subset.k)
    shape = (len(x), subset.k)
    values, places = selection.values.view(shape), selection.pattern.features.view(shape)
    return auxk_loss(dictionary, x, residual, context, values, places)
