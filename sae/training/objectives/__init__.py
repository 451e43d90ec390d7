"""Training objectives: pure functions of a dictionary, an input and a target, one per architecture."""

from __future__ import annotations

from sae.training.objectives.common import OBJECTIVES, Losses, Objective, StepInputs
from sae.training.objectives.penalised import gated_loss, jumprelu_loss, relu_loss
from sae.training.objectives.selected import batch_topk_loss, matryoshka_loss, topk_loss

__all__ = [
    "OBJECTIVES",
    "Losses",
    "Objective",
    "StepInputs",
    "batch_topk_loss",
    "gated_loss",
    "jumprelu_loss",
    "matryoshka_loss",
    "relu_loss",
    "topk_loss",
]  # fmt: skip
