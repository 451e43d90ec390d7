"""How good a dictionary is on held-out tokens: reconstruction, sparsity, language-model loss, next to baselines."""

from __future__ import annotations

from sae.evaluation.candidate import Autoencoder
from sae.evaluation.comparison import Compared, Comparison, compare
from sae.evaluation.comparison_view import comparison_tables
from sae.evaluation.recovery import Detection, Labelled, Recovery, detection, measure_recovery
from sae.evaluation.replacement import ReplacedModule, ReplacementLosses, ReplacementReport, measure_replacement
from sae.evaluation.replacement_view import replacement_tables
from sae.evaluation.report import Report, Scores
from sae.evaluation.report_view import report_table
from sae.evaluation.scoring import evaluate, evaluate_all
from sae.evaluation.stored import (
    StoredReport,
    read_comparison,
    read_replacement,
    write_comparison,
    write_replacement,
    write_report,
)
from sae.results.estimate import Estimate

__all__ = [
    "Autoencoder",
    "Compared",
    "Comparison",
    "Detection",
    "Estimate",
    "Labelled",
    "Recovery",
    "ReplacedModule",
    "ReplacementLosses",
    "ReplacementReport",
    "Report",
    "Scores",
    "StoredReport",
    "compare",
    "comparison_tables",
    "detection",
    "evaluate",
    "evaluate_all",
    "measure_recovery",
    "measure_replacement",
    "read_comparison",
    "read_replacement",
    "replacement_tables",
    "report_table",
    "write_comparison",
    "write_replacement",
    "write_report",
]
