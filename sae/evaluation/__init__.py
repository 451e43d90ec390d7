"""How good a dictionary is on held-out tokens: reconstruction, sparsity, language-model loss, beside baselines."""

from __future__ import annotations

from sae.evaluation.estimate import Estimate
from sae.evaluation.evaluate import evaluate, evaluate_all
from sae.evaluation.render import report_table
from sae.evaluation.report import Report, Scores, write_report

__all__ = ["Estimate", "Report", "Scores", "evaluate", "evaluate_all", "report_table", "write_report"]
