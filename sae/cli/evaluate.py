"""`sae eval`: measure dictionaries on held-out text."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import OnDictionary, Options, evaluation_overrides, on_dictionary, show_report
from sae.console.terminal import say


@click.command("eval")
@click.argument("arguments", nargs=-1, required=True, metavar="RUN... [KEY=VALUE]...")
@on_dictionary()
@click.pass_obj
def evaluate(options: Options, arguments: tuple[str, ...], given: OnDictionary) -> None:
    """Measure dictionaries on held-out text.

    RUN is a run folder; eval.json, eval.md and figures are written into it. Runs on the same activations share the
    language model's passes, so evaluating them together costs less than one by one. KEY=VALUE overrides settings of the
    runs: evaluation.*, model.*, harvest.cache, device.

    With --model and --data, RUN is any dictionary that `sae convert` reads. Its activations on TEXTS are harvested into
    a run folder, which is made once, and which every command takes. KEY=VALUE sets data.*, harvest.* and features.*
    too. Numbers that were published with the dictionary are shown next to ours.
    """
    from sae.runs.evaluation import evaluate_runs
    from sae.runs.opening import open_runs

    overrides, paths = evaluation_overrides(arguments, given)
    if not paths:
        raise click.UsageError("name at least one run folder before the overrides")
    with options.progress() as progress:
        distinct = {Path(path).resolve(): path for path in paths}
        runs = open_runs(list(distinct.values()), overrides, **given.arguments, progress=progress)
        reports = evaluate_runs(runs)
    for run, report in zip(runs, reports, strict=True):
        if len(runs) > 1:
            say(run.folder)
        show_report(report)
