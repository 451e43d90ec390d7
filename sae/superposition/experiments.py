"""Experiments with toy models: default settings, measurements, and results that fit into JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from sae.config.progress import StageProgress
from sae.numerics.modes import in_own_modes
from sae.superposition.geometry import dimensions_per_feature, feature_dimensionality, is_pentagon, neighbour_angles
from sae.superposition.phases import AWAY, phase_diagram, phase_grid
from sae.superposition.toy import ToyTraining, expected_loss, train_toy_models

Row = tuple[float, ...]


@dataclass(frozen=True)
class GeometrySettings:
    """Settings for features in the plane as density falls.

    Attributes:
        features: number of features in two hidden dimensions.
        densities: one per column of the figure.
        importance: feature i has importance ** i.
        runs: models trained at each density, from one seed each; the one with the lowest loss is drawn.
        training: of the models.
    """

    features: int = 5
    densities: Row = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
    importance: float = 0.95
    runs: int = 10
    training: ToyTraining = field(default_factory=ToyTraining)


@dataclass(frozen=True)
class PlaneModels:
    """Models trained at one density.

    Attributes:
        density: p.
        losses: expected loss of every run.
        pentagons: runs that are a regular pentagon within 2° and 0.02 (`is_pentagon`).
        W, angles, dimensionality: of the run with the lowest loss.
    """

    density: float
    losses: Row
    pentagons: int
    W: tuple[Row, ...]
    angles: Row
    dimensionality: Row


@dataclass(frozen=True)
class GeometryResult:
    """Results by density.

    Attributes:
        importance: of each feature, in all models.
        models: one entry per density.
    """

    importance: Row
    models: tuple[PlaneModels, ...]


@in_own_modes
def run_geometry(settings: GeometrySettings, seed: int, progress: StageProgress | None = None) -> GeometryResult:
    """Train `runs` models at each density."""
    density = torch.tensor(settings.densities).repeat_interleave(settings.runs)
    importance = (settings.importance ** torch.arange(settings.features)).float()
    weights = importance.expand(len(density), -1)
    models = train_toy_models(density, weights, 2, settings.training, seed=seed, progress=progress)
    results = []
    for number, p in enumerate(settings.densities):
        runs = models.select(torch.arange(number * settings.runs, (number + 1) * settings.runs))
        losses = expected_loss(runs)
        chosen = runs.W[losses.argmin()]
        results.append(
            PlaneModels(
                density=p,
                losses=_row(losses),
                pentagons=sum(is_pentagon(W) for W in runs.W),
                W=tuple(map(_row, chosen)),
                angles=_row(neighbour_angles(chosen)),
                dimensionality=_row(feature_dimensionality(chosen)),
            )
        )
    return GeometryResult(_row(importance), tuple(results))


@dataclass(frozen=True)
class DimensionalitySettings:
    """Settings for feature dimensionality against 1/density in a larger model.

    Attributes:
        features, hidden: size of each model.
        densities: number of densities from 1 down to `lowest`, in equal steps of the logarithm.
        lowest: the smallest density.
        training: of the models.
    """

    features: int = 120
    hidden: int = 12
    densities: int = 18
    lowest: float = 0.01
    training: ToyTraining = field(default_factory=lambda: ToyTraining(batch_size=256))


@dataclass(frozen=True)
class DimensionalityResult:
    """Results by density.

    Attributes:
        hidden: number of hidden dimensions.
        densities: p.
        dimensions_per_feature: m / ‖W‖²_F.
        norms: ‖W_i‖ of each feature.
        dimensionality: D_i of each feature.
    """

    hidden: int
    densities: Row
    dimensions_per_feature: Row
    norms: tuple[Row, ...]
    dimensionality: tuple[Row, ...]


@in_own_modes
def run_dimensionality(
    settings: DimensionalitySettings, seed: int, progress: StageProgress | None = None
) -> DimensionalityResult:
    """Train one model at each density, all features equally important."""
    density = torch.from_numpy(np.geomspace(1, settings.lowest, settings.densities)).float().clamp_max(1)
    importance = torch.ones(settings.densities, settings.features)
    models = train_toy_models(density, importance, settings.hidden, settings.training, seed=seed, progress=progress)
    return DimensionalityResult(
        hidden=settings.hidden,
        densities=_row(density),
        dimensions_per_feature=_row(dimensions_per_feature(models.W)),
        norms=tuple(map(_row, models.W.norm(dim=2))),
        dimensionality=tuple(map(_row, feature_dimensionality(models.W))),
    )


@dataclass(frozen=True)
class PhaseSettings:
    """Settings for a phase diagram over the density and the importance of the last feature.

    Attributes:
        features, hidden: 2 in 1, or 3 in 2.
        densities, importances: number of cells from 1 to 0.01 and from 0.1 to 10 (`phase_grid`).
        restarts: models per cell; the one with the lowest loss is kept.
        training: of the models.
    """

    features: int = 2
    hidden: int = 1
    densities: int = 13
    importances: int = 14
    restarts: int = 8
    training: ToyTraining = field(default_factory=lambda: ToyTraining(steps=1500, batch_size=256))


@dataclass(frozen=True)
class PhaseResult:
    """Phases of the last feature; rows by density, columns by importance.

    Attributes:
        densities, importances: of the rows and columns.
        trained, analytic: indices into `PHASES`.
        margin: analytic loss of the second-best phase divided by that of the best.
        loss_ratio: trained loss divided by the least analytic one.
        agree, cells: numbers of cells where the phases agree, and of all cells.
        agree_away, cells_away: the same for cells whose margin is at least `AWAY`.
    """

    densities: Row
    importances: Row
    trained: tuple[tuple[int, ...], ...]
    analytic: tuple[tuple[int, ...], ...]
    margin: tuple[Row, ...]
    loss_ratio: tuple[Row, ...]
    agree: int
    cells: int
    agree_away: int
    cells_away: int


@in_own_modes
def run_phases(settings: PhaseSettings, seed: int, progress: StageProgress | None = None) -> PhaseResult:
    """Train every cell, and count the cells where the phase is the analytic one."""
    diagram = phase_diagram(
        (settings.features, settings.hidden),
        *phase_grid(settings.densities, settings.importances),
        restarts=settings.restarts, training=settings.training, seed=seed, progress=progress,
    )  # fmt: skip
    agree, cells = diagram.agreement()
    agree_away, cells_away = diagram.agreement(AWAY)
    return PhaseResult(
        densities=_row(diagram.density),
        importances=_row(diagram.importance),
        trained=tuple(tuple(row) for row in diagram.trained.tolist()),
        analytic=tuple(tuple(row) for row in diagram.analytic.tolist()),
        margin=tuple(map(_row, diagram.margin)),
        loss_ratio=tuple(map(_row, diagram.loss_ratio)),
        agree=agree,
        cells=cells,
        agree_away=agree_away,
        cells_away=cells_away,
    )


def _row(numbers: torch.Tensor) -> Row:
    return tuple(numbers.double().tolist())
