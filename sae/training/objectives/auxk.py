"""AuxK: dead features learn to reconstruct what the living leave over, until they live."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.architectures import Gated
from sae.dictionary.base import Dictionary
from sae.kernels.interface import Selection, Subset
from sae.kernels.pattern import Pattern
from sae.kernels.sparse import decode, encode_at, rows_of, select_topk
from sae.training.objectives.common import StepInputs, mean_squared_error


def auxk_loss(
    dictionary: Dictionary,
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    context: StepInputs,
    values: Float[Tensor, "batch k_aux"],
    places: Int[Tensor, "batch k_aux"],
) -> Float[Tensor, ""]:
    """AuxK: ‖e − ê‖², where ê is what the k_aux strongest dead features make of the residual e (no b_dec in either).

    Scaled by min(dead / k_aux, 1), so that it fades as features revive; 0 where none is dead. The residual is a fixed
    target; gradients reach the dead features' encoder and decoder.   Gao et al. 2024, appendix A.2.

    Args:
        x: what the dead features were selected on.
        residual: e, detached.
        values: what `dead_encoder` makes of each row for the dead features that were selected in it.
        places: where they stand among `context.dead_candidates`.
    """
    candidates = context.dead_candidates
    pattern = Pattern.from_indices(places, len(candidates))
    pre = encode_at(x, dictionary.b_dec, *dead_encoder(dictionary, context), Selection(pattern, values.flatten()))
    guess = decode(pattern, pre.relu(), rows_of(dictionary.W_dec, candidates, context.decoder_sink))
    share = (context.dead[candidates].sum() / context.k_aux).clamp(max=1.0)
    return share * mean_squared_error(residual, guess)


def dead_encoder(
    dictionary: Dictionary, context: StepInputs
) -> tuple[Float[Tensor, "candidates d_in"], Float[Tensor, " candidates"]]:
    """The encoder rows and biases whose ReLU is what the dead features would be worth if they fired.

    Gated's are those of the magnitude. Its gate is shut on every row, or the feature were not dead, and has no say.
    """
    candidates = context.dead_candidates
    rows = rows_of(dictionary.W_enc.T, candidates, context.encoder_sink)
    if isinstance(dictionary, Gated):
        return rows * dictionary.r_mag[candidates].exp()[:, None], dictionary.b_mag[candidates]
    return rows, dictionary.b_enc[candidates]


def dead_subset(context: StepInputs, dtype: torch.dtype) -> Subset | None:
    """The features that AuxK may use, those that have come to life since they were listed taken out."""
    candidates = context.dead_candidates
    if context.aux_coefficient == 0 or len(candidates) == 0:
        return None
    penalty = torch.zeros(len(candidates), dtype=dtype, device=candidates.device)
    penalty.masked_fill_(~context.dead[candidates], -torch.inf)
    return Subset(candidates, penalty, min(context.k_aux, len(candidates)))


def auxk_after(
    dictionary: Dictionary, x: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_in"], context: StepInputs
) -> Float[Tensor, ""] | None:
    """`auxk_loss` where the objective's own selection did not look at the dead features; None where none is dead."""
    subset = dead_subset(context, x.dtype)
    if subset is None:
        return None
    rows, biases = dead_encoder(dictionary, context)
    chosen = select_topk(x, dictionary.b_dec, rows, biases + subset.penalty, subset.k)
    shape = (len(x), subset.k)
    return auxk_loss(dictionary, x, residual, context, chosen.values.view(shape), chosen.pattern.features.view(shape))
