"""Evaluates the dictionaries of several runs: together if they have the same activations, model and settings."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from sae.evaluation import Report
from sae.model.language_model import LanguageModel
from sae.runs.run import Run


def evaluate_runs(runs: Sequence[Run], at_once: int | None = None) -> list[Report]:
    """Evaluate several runs' dictionaries, and write each report into the run's folder.

    Runs with the same activations, model and evaluation settings are evaluated together, at most `at_once` at a time.
    Their reports are written before the next runs are evaluated.

    Raises:
        SaeError: `Run.cache` or `sae.evaluation.evaluate` fails.
    """
    models: dict[Hashable, LanguageModel] = {}
    groups: dict[Hashable, list[int]] = {}
    for number, run in enumerate(runs):
        config = run.config
        activations = run.cache().manifest.identity(config.gives)
        shared = (activations, config.gives, config.model, config.evaluation, run.device)
        groups.setdefault(shared, []).append(number)
    for run in runs:
        run.check_metrics()
    reports: dict[int, Report] = {}
    for numbers in groups.values():
        first = runs[numbers[0]]
        key = (first.config.model, first.device)
        if key not in models:
            models[key] = first.language_model
        for start in range(0, len(numbers), at_once or len(numbers)):
            part = numbers[start : start + (at_once or len(numbers))]
            leading = runs[part[0]]
            leading.language_model = models[key]
            reports |= zip(part, leading.evaluate_together([runs[number] for number in part]), strict=True)
    return [reports[number] for number in range(len(runs))]
