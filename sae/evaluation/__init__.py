"""How good a dictionary is on held-out tokens: reconstruction, sparsity, language-model loss, next to baselines."""

from __future__ import annotations

from sae.evaluation.candidate import Autoencoder
from sae.evaluation.comparison import Comparison, compare
from sae.evaluation.comparison_view import comparison_tables
from sae.evaluation.report import Report, Scores
from sae.evaluation.report_view import report_table
from sae.evaluation.scoring import evaluate, evaluate_all
from sae.evaluation.stored import write_comparison, write_report
from sae.results.estimate import Estimate

__all__ = [
    "Autoencoder",
    "Comparison",
    "Estimate",
    "Report",
    "Scores",
    "compare",
    "comparison_tables",
    "evaluate",
    "evaluate_all",
    "report_table",
    "write_comparison",
    "write_report",
]
