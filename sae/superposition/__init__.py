"""Toy models of superposition: ground truth for dictionaries, trained and analytic."""

from __future__ import annotations

from sae.errors import renamed
from sae.superposition.geometry import dimensions_per_feature, feature_dimensionality, is_pentagon, neighbour_angles
from sae.superposition.phases import PHASES, PhaseDiagram, analytic_losses, last_feature_phase, phase_diagram
from sae.superposition.runner import EXPERIMENTS, Finished, run
from sae.superposition.synthetic import (
    Sample,
    SyntheticFeatures,
    SyntheticSource,
    even_features,
    toy_features,
    uneven_features,
)
from sae.superposition.toy import ToyModels, ToyTraining, best_of_restarts, expected_loss, train_toy_models

__all__ = [
    "EXPERIMENTS",
    "PHASES",
    "Finished",
    "PhaseDiagram",
    "Sample",
    "SyntheticFeatures",
    "SyntheticSource",
    "ToyModels",
    "ToyTraining",
    "analytic_losses",
    "best_of_restarts",
    "dimensions_per_feature",
    "even_features",
    "expected_loss",
    "feature_dimensionality",
    "is_pentagon",
    "last_feature_phase",
    "neighbour_angles",
    "phase_diagram",
    "run",
    "toy_features",
    "train_toy_models",
    "uneven_features",
]

__getattr__ = renamed(
    __name__,
    {
        "World": "SyntheticFeatures",
        "WorldSource": "SyntheticSource",
        "even_world": "even_features",
        "hard_world": "uneven_features",
        "toy_world": "toy_features",
    },
)
