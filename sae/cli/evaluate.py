"""`sae eval`: measure dictionaries on held-out text."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import Options, evaluation_overrides, show_report
from sae.console.terminal import say


@click.command("eval")
@click.argument("arguments", nargs=-1, required=True, metavar="RUN... [KEY=VALUE]...")
@click.pass_obj
def evaluate(options: Options, arguments: tuple[str, ...]) -> None:
    """Measure dictionaries on held-out text.

    RUN is a run folder; eval.json, eval.md and figures are written into it. Runs on the same activations share the
    language model's passes, so evaluating them together costs less than one by one. KEY=VALUE overrides settings of the
    runs: evaluation.*, model.*, harvest.cache, device.
    """
    from sae.runs.evaluation import evaluate_runs
    from sae.runs.run import Run

    overrides, paths = evaluation_overrides(arguments)
    if not paths:
        raise click.UsageError("name at least one run folder before the overrides")
    with options.progress() as progress:
        runs = {Path(path).resolve(): Run.open(path, overrides, progress) for path in paths}
        reports = evaluate_runs(list(runs.values()))
    for run, report in zip(runs.values(), reports, strict=True):
        if len(runs) > 1:
            say(run.folder)
        show_report(report)
