"""Phase diagrams of the last feature over density and importance, trained and analytic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.polynomial import Polynomial
from torch import Tensor

from sae.config.progress import StageProgress
from sae.errors import ConfigError
from sae.numerics.modes import in_own_modes
from sae.superposition.geometry import REPRESENTED
from sae.superposition.toy import ToyTraining, best_of_restarts, train_toy_models

PHASES = ("ignored", "dedicated", "superposition")
"""Phases of the last feature: no direction, a dimension of its own, or one that it shares with others."""
SHAPES = ((2, 1), (3, 2))
"""Features and hidden dimensions for which the analytic minima are known."""
AWAY = 1.25
"""Least margin of a cell that counts as away from the boundary."""
_COSINE = 0.25
"""Least |cos| to a represented feature at which a direction counts as shared; it is 1 in a pair, ½ in a triangle."""


def ignored_loss(p: float) -> float:
    """Least loss of a feature that has no direction, at importance 1: its variance, Var x = p/3 − p²/4, at b = E x."""
    return p / 3 - p * p / 4


def antipodal_loss(p: float) -> float:
    """Least loss of each feature of an antipodal pair of unit directions, at importance 1.

    x' = ReLU(x − y + b) with y the other feature. With c = 1 − b and 0 ≤ b ≤ 1, over the moments of U[0, 1],

        f(b) = (1−p)² b² + p(1−p) (b² + b³/3) + p² (b³/3 + c³/3 − c⁴/6);  f(0) = p²/6.

    The four terms are both absent, x alone, y alone, both present. The bias is the minimiser of this polynomial, see
    `_least`.
    """
    b = Polynomial([0.0, 1.0])
    c = 1 - b
    q = 1 - p
    return _least(q * q * b**2 + p * q * (b**2 + b**3 / 3) + p * p * (b**3 / 3 + c**3 / 3 - c**4 / 6))


def triangle_loss(p: float) -> float:
    """Least loss of each of three unit directions 120° apart, at importance 1.

    x' = ReLU(x − y + b) with y half the sum of the other two features. With t = y − b, the error given t, over x,
    is g(t) = t² for t < 0 and t² − 2t³/3 from there to 1 if x is present, and max(−t, 0)² if it is not. One of
    the others gives y the density 2 on [0, ½]; both give it 4y on [0, ½] and 4(1 − y) on [½, 1]. With e = ½ − b,
    c = 1 − b and 0 ≤ b ≤ ½ the integrals are polynomials in b; f(0) = p²/8 to second order in p.
    """
    b = Polynomial([0.0, 1.0])
    c, e, q = 1 - b, 0.5 - b, 1 - p

    def beyond(t: Polynomial) -> Polynomial:
        """∫ (c − t) (t² − 2t³/3) dt from 0."""
        return c * t**3 / 3 - t**4 / 4 - (c * t**4 / 4 - t**5 / 5) * (2 / 3)

    present = (
        q * q * b**2
        + 2 * p * q * (2 * b**3 / 3 + 2 * (e**3 / 3 - e**4 / 6))
        + p * p * (b**4 / 3 + 4 * (b * e**3 / 3 - b * e**4 / 6 + e**4 / 4 - 2 * e**5 / 15))
        + p * p * 4 * (beyond(c) - beyond(e))
    )
    absent = q * q * b**2 + 2 * p * q * 2 * b**3 / 3 + p * p * b**4 / 3
    return _least(p * present + q * absent)


def _least(f: Polynomial) -> float:
    """The minimum of f over the bias, exactly: at a root of f′ in [0, ½] or an end.

    No other bias can be better. Below 0, ReLU(x − y + b) never exceeds x, so raising b to 0 only shrinks the error.
    If f′ = 0, b is the mean of y given that the output is positive, which happens for small y, so b is at most
    E y = p/2.
    """
    roots = f.deriv().roots()
    inside = [float(root.real) for root in roots if abs(root.imag) < 1e-12 and 0 <= root.real <= 0.5]
    return float(min(f(b) for b in (0.0, 0.5, *inside)))


@in_own_modes
def analytic_losses(
    features: int, density: Float[Tensor, " densities"], importance: Float[Tensor, " importances"]
) -> Float[Tensor, "phases densities importances"]:
    """Expected loss of the best configuration of unit directions for each of the last feature's `PHASES`.

    All features but the last have importance 1. With V, A and T the losses above and I the importance of the last:

    | | ignored | dedicated | superposition |
    |---|---|---|---|
    | 2 in 1 dimension | I V | V | (1 + I) A |
    | 3 in 2 dimensions | I V | min(V, 2 A): one is ignored, or the others are a pair | min((1 + I) A, (2 + I) T) |

    Raises:
        ConfigError: the number of features is not 2 or 3.
    """
    if features not in {shape[0] for shape in SHAPES}:
        raise ConfigError(f"{features} features: the analytic phases are known for 2 in 1 dimension and 3 in 2")
    p = density.double().tolist()
    V, A, T = (
        torch.tensor([loss(value) for value in p], dtype=torch.float64)[:, None]
        for loss in (ignored_loss, antipodal_loss, triangle_loss)
    )
    weight = importance.double()[None]
    one = torch.ones_like(weight)
    if features == 2:
        return torch.stack([weight * V, one * V, (1 + weight) * A])
    return torch.stack([weight * V, one * torch.minimum(V, 2 * A), torch.minimum((1 + weight) * A, (2 + weight) * T)])


def last_feature_phase(W: Float[Tensor, "instances features hidden"]) -> Int[Tensor, " instances"]:
    """Index into `PHASES` of each model's last feature, by norms and cosines.

    Ignored: its norm is at most ½. In superposition: |cos| to another represented feature is at least ¼.
    """
    norms = W.norm(dim=2)
    directions = W / norms.clamp_min(1e-12)[:, :, None]
    cosines = (directions[:, :-1] @ directions[:, -1:].mT).squeeze(2).abs()
    shared = ((cosines >= _COSINE) & (norms[:, :-1] > REPRESENTED)).any(1)
    return torch.where(norms[:, -1] <= REPRESENTED, 0, torch.where(shared, 2, 1))


@dataclass(frozen=True)
class PhaseDiagram:
    """Trained and analytic phases over density and importance.

    Attributes:
        density: of every feature.
        importance: of the last feature; that of the others is 1.
        trained, analytic: indices into `PHASES`.
        margin: analytic loss of the second-best phase divided by that of the best; near 1 at a boundary.
        loss_ratio: trained loss divided by the least analytic one. Directions of a trained model may have any norm
            and angle, so values below 1 are expected, and values well above 1 mean that training failed.
    """

    density: Float[Tensor, " densities"]
    importance: Float[Tensor, " importances"]
    trained: Int[Tensor, "densities importances"]
    analytic: Int[Tensor, "densities importances"]
    margin: Float[Tensor, "densities importances"]
    loss_ratio: Float[Tensor, "densities importances"]

    def agreement(self, margin: float = 1.0) -> tuple[int, int]:
        """Numbers of cells of at least this margin: those whose trained and analytic phases agree, and all."""
        away = self.margin >= margin
        return int((away & (self.trained == self.analytic)).sum()), int(away.sum())


@in_own_modes
def phase_diagram(
    shape: tuple[int, int],
    density: Float[Tensor, " densities"],
    importance: Float[Tensor, " importances"],
    *,
    restarts: int = 4,
    training: ToyTraining | None = None,
    seed: int = 0,
    progress: StageProgress | None = None,
) -> PhaseDiagram:
    """Train every cell `restarts` times, keep the model of lowest loss, and compare its phase with the analytic one.

    Args:
        shape: features and hidden dimensions, one of `SHAPES`.
        density: probabilities of a feature's presence.
        importance: of the last feature.
        restarts: models trained for each cell.
        training: how the models are trained.
        seed: of initialisation and inputs.
        progress: as for `train_toy_models`.

    Raises:
        ConfigError: the shape is not one of `SHAPES`.
    """
    if shape not in SHAPES:
        raise ConfigError(f"{shape[0]} features in {shape[1]} dimensions: expected 2 in 1 or 3 in 2")
    features, hidden = shape
    cells = torch.cartesian_prod(density.float(), importance.float()).repeat_interleave(restarts, 0)
    weights = torch.ones(len(cells), features)
    weights[:, -1] = cells[:, 1]
    models = train_toy_models(cells[:, 0], weights, hidden, training, seed=seed, progress=progress)
    best, losses = best_of_restarts(models, restarts)
    analytic = analytic_losses(features, density, importance)
    ranked = analytic.sort(0)
    grid = (len(density), len(importance))
    return PhaseDiagram(
        density=density,
        importance=importance,
        trained=last_feature_phase(best.W).reshape(grid),
        analytic=ranked.indices[0],
        margin=ranked.values[1] / ranked.values[0],
        loss_ratio=losses.reshape(grid) / ranked.values[0],
    )


def phase_grid(densities: int, importances: int) -> tuple[Float[Tensor, " densities"], Float[Tensor, " importances"]]:
    """Densities from 1 down to 0.01 and importances from 0.1 to 10, in equal steps of their logarithms."""
    return torch.from_numpy(np.geomspace(1, 0.01, densities)), torch.from_numpy(np.geomspace(0.1, 10, importances))
