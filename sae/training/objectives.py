"""What training minimises: pure functions of a dictionary and a batch, one per architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary import Dictionary
from sae.sparse import decode_sparse


@dataclass(frozen=True)
class Context:
    """What an objective needs beside the dictionary and the batch.

    Attributes:
        dead: features that are dead now.
        dead_candidates: their indices as listed a few steps ago; the only ones AuxK looks at.
        l1_coefficient: weight of the L1 penalty at this step.
        aux_coefficient, k_aux: weight and size of AuxK.
    """

    dead: Bool[Tensor, " d_sae"]
    dead_candidates: Int[Tensor, " candidates"]
    l1_coefficient: float
    aux_coefficient: float
    k_aux: int


@dataclass(frozen=True)
class Losses:
    """The total, its terms (detached, for the log), and which features fired."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    reconstruction: Float[Tensor, "batch d_in"]
    fired: Bool[Tensor, " d_sae"]
    l0: Float[Tensor, ""]


Objective = Callable[[Dictionary, Tensor, Context], Losses]


def pre_activations(dictionary: Dictionary, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """(x − b_dec) W_enc + b_enc, computed as x W_enc + (b_enc − b_dec W_enc).

    Equal but for rounding; b_dec's gradient then costs a matrix times a vector instead of the dense gradient of x.
    """
    return x @ dictionary.W_enc + (dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc)


def mean_squared_error(
    x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"]
) -> Float[Tensor, ""]:
    """Mean over tokens of ‖x − x̂‖²."""
    return (x - reconstruction).square().sum(-1).mean()


def topk_loss(dictionary: Dictionary, x: Float[Tensor, "batch d_in"], context: Context) -> Losses:
    """‖x − x̂‖² + α · AuxK, with x̂ from the k strongest features.   Gao et al. 2024, §2.3 and appendix A.2."""
    k = dictionary.settings()["k"]
    pre = pre_activations(dictionary, x)
    values, indices = pre.topk(k, dim=-1, sorted=False)
    values = values.relu()
    reconstruction = decode_sparse(values, indices, dictionary.W_dec) + dictionary.b_dec
    mse = mean_squared_error(x, reconstruction)
    terms = {"mse": mse.detach()}
    total = mse
    if context.aux_coefficient > 0 and len(context.dead_candidates):
        aux = auxk_loss(dictionary, pre, (x - reconstruction).detach(), context)
        total = total + context.aux_coefficient * aux
        terms["aux"] = aux.detach()
    active = values.detach() > 0
    fired = torch.zeros(dictionary.d_sae, dtype=torch.int32, device=x.device)
    fired.index_add_(0, indices.flatten(), active.flatten().int())
    return Losses(total, terms, reconstruction.detach(), fired > 0, active.sum(-1).float().mean())


def auxk_loss(
    dictionary: Dictionary,
    pre: Float[Tensor, "batch d_sae"],
    residual: Float[Tensor, "batch d_in"],
    context: Context,
) -> Float[Tensor, ""]:
    """AuxK: ‖e − ê‖², where ê is what the k_aux strongest dead features make of the residual e (no b_dec in either).

    Scaled by min(dead / k_aux, 1), so that it fades as features revive; 0 where none is dead. The residual is a fixed
    target; gradients reach the dead features' encoder and decoder.   Gao et al. 2024, appendix A.2.
    """
    candidates = context.dead_candidates
    is_dead = context.dead[candidates]
    dead_pre = pre[:, candidates].masked_fill(~is_dead, -torch.inf)
    values, places = dead_pre.topk(min(context.k_aux, len(candidates)), dim=-1, sorted=False)
    guess = decode_sparse(values.relu(), places, dictionary.W_dec[candidates])
    share = (is_dead.sum() / context.k_aux).clamp(max=1.0)
    return share * mean_squared_error(residual, guess)


def relu_loss(dictionary: Dictionary, x: Float[Tensor, "batch d_in"], context: Context) -> Losses:
    """‖x − x̂‖² + λ Σ_j f_j ‖W_dec,j‖, with every positive pre-activation firing.   Bricken et al. 2023."""
    features = pre_activations(dictionary, x).relu()
    reconstruction = dictionary.decode(features)
    mse = mean_squared_error(x, reconstruction)
    l1 = (features * dictionary.W_dec.norm(dim=-1)).sum(-1).mean()
    active = features.detach() > 0
    terms = {"mse": mse.detach(), "l1": l1.detach()}
    total = mse + context.l1_coefficient * l1
    return Losses(total, terms, reconstruction.detach(), active.any(0), active.sum(-1).float().mean())


OBJECTIVES: dict[str, Objective] = {"relu": relu_loss, "topk": topk_loss}
