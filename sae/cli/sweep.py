"""`sae sweep`: train many dictionaries in one pass, and compare them."""

from __future__ import annotations

import click

from sae.cli.arguments import OfConfiguration, Options, configured
from sae.config.settings import RunConfig
from sae.console.terminal import output, say
from sae.errors import SaeError


@click.command(cls=OfConfiguration)
@configured
@click.pass_obj
def sweep(options: Options, settings: RunConfig) -> None:
    """Train and compare many dictionaries in one pass.

    CONFIG is a YAML file with lists of values under 'sweep', or the name of a configuration that comes with sae, such
    as sweep. One dictionary is trained for every combination, all in
    one pass over the activations. sweep.md, sweep.json and pareto.png compare them; each has its own run folder. An
    interrupted sweep resumes where it stopped.
    """
    from sae.evaluation.sweep_view import sweep_tables
    from sae.runs.sweeping import MARKDOWN_FILE
    from sae.runs.sweeping import sweep as run_sweep

    with options.progress() as progress:
        result = run_sweep(settings, progress)
    console = output()
    say(result.of.replace("`", "") + "\n")
    for table in sweep_tables(result.points, result.behind, console.width):
        console.print(table, "")
    say(f"{len(result.points)} dictionaries in {result.folder}, compared in {MARKDOWN_FILE} there")
    for name, reason in result.failures.items():
        say(f"not trained: {name}: {reason}")
    if result.failures:
        raise SaeError(f"{len(result.failures)} of the sweep's dictionaries were not trained; {MARKDOWN_FILE} says why")
