"""How good a dictionary is, on held-out tokens: reconstruction, sparsity, language-model loss, and baselines for all of them."""

from __future__ import annotations

from sae.evaluation.estimate import Estimate
from sae.evaluation.evaluate import evaluate
from sae.evaluation.report import Report, Scores, write_report

__all__ = ["Estimate", "Report", "Scores", "evaluate", "write_report"]
