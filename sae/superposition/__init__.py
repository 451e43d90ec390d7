"""Toy models of superposition: ground truth for dictionaries, trained and analytic."""

from __future__ import annotations

from sae.superposition.geometry import dimensions_per_feature, feature_dimensionality, is_pentagon, neighbour_angles
from sae.superposition.phases import PHASES, PhaseDiagram, analytic_losses, last_feature_phase, phase_diagram
from sae.superposition.runner import EXPERIMENTS, Finished, run
from sae.superposition.toy import ToyModels, ToyTraining, best_of_restarts, expected_loss, train_toy_models
from sae.superposition.world import Sample, World, WorldSource, even_world, hard_world, toy_world

__all__ = [
    "EXPERIMENTS",
    "PHASES",
    "Finished",
    "PhaseDiagram",
    "Sample",
    "ToyModels",
    "ToyTraining",
    "World",
    "WorldSource",
    "analytic_losses",
    "best_of_restarts",
    "dimensions_per_feature",
    "even_world",
    "expected_loss",
    "feature_dimensionality",
    "hard_world",
    "is_pentagon",
    "last_feature_phase",
    "neighbour_angles",
    "phase_diagram",
    "run",
    "toy_world",
    "train_toy_models",
]
