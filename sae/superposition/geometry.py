"""How directions share a space: feature dimensionality, angles between neighbours."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import ShapeError

REPRESENTED = 0.5
"""Norm above which a feature counts as represented: a trained direction has about norm 1 or about 0."""


def feature_dimensionality(W: Float[Tensor, "*instances features hidden"]) -> Float[Tensor, "*instances features"]:
    """D_i = ‖W_i‖² / Σ_j (Ŵ_i · W_j)²: the share of a dimension that a feature has to itself.   Elhage et al. 2022.

    1 for a feature that is orthogonal to all others, ½ for each of an antipodal pair, ⅖ in a regular pentagon; 0 for
    a direction of norm 0. Σ_i D_i ≤ rank W ≤ hidden: with G = Σ_j W_j W_jᵀ it is D_i = (W_i·W_i)² / (W_iᵀ G W_i), which
    by Cauchy–Schwarz is at most W_iᵀ G⁺ W_i, and those sum to tr(G⁺G).
    """
    W = W.double()
    norms = W.norm(dim=-1)
    directions = W / norms.where(norms > 0, 1.0)[..., None]
    shared = (directions @ W.mT).square().sum(-1)
    return norms.square() / shared.where(shared > 0, 1.0)


def neighbour_angles(W: Float[Tensor, "features hidden"], represented: float = REPRESENTED) -> Float[Tensor, " angles"]:
    """Angles in degrees between neighbouring directions in the plane, all the way round; they sum to 360.

    Args:
        W: one model's directions, in two dimensions.
        represented: directions of at most this norm are left out; if fewer than two remain, there are no angles.

    Raises:
        ShapeError: the hidden space does not have two dimensions.
    """
    if W.shape[1] != 2:
        raise ShapeError(f"directions of shape {list(W.shape)}: neighbours have an order only in two dimensions")
    directions = W[W.norm(dim=1) > represented].double()
    if len(directions) < 2:
        return torch.zeros(0, dtype=torch.float64, device=W.device)
    angles = torch.atan2(directions[:, 1], directions[:, 0]).sort().values
    gaps = angles.diff(append=angles[:1] + 2 * math.pi)
    return gaps * 180 / math.pi


def dimensions_per_feature(W: Float[Tensor, "*instances features hidden"]) -> Float[Tensor, "*instances"]:
    """m / ‖W‖²_F: hidden dimensions for each feature that the model has learned.   Elhage et al. 2022."""
    return W.shape[-1] / W.double().square().sum((-2, -1))


def is_pentagon(W: Float[Tensor, "features hidden"], degrees: float = 2.0, dimensionality: float = 0.02) -> bool:
    """Whether five directions in the plane are 72° apart and have 2/5 of a dimension each, within the tolerances."""
    angles = neighbour_angles(W)
    if len(angles) != 5 or len(W) != 5:
        return False
    apart = bool(((angles - 72).abs() <= degrees).all())
    return apart and bool(((feature_dimensionality(W) - 2 / 5).abs() <= dimensionality).all())
