"""`sae superposition`: toy models, and dictionaries on activations whose features are known."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import Options, beginning_again
from sae.config.base import LARGEST
from sae.console.terminal import output, say


@click.command()
@click.argument("experiments", nargs=-1, metavar="[EXPERIMENT]...")
@click.option(
    "--out",
    default="runs/superposition",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the results.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, LARGEST), help="Random seed.")
@click.pass_obj
def superposition(options: Options, experiments: tuple[str, ...], out: Path, seed: int) -> None:
    """Train toy models of superposition, and dictionaries whose true features are known.

    EXPERIMENT is one or more of: geometry, dimensionality, phases-2-1, phases-3-2, recovery-toy, recovery-even,
    recovery-hard; the default is all of them. superposition.json, superposition.md and a figure for each experiment are
    written into the folder. Existing results are reused, so an interruption loses only the experiment that was running.
    """
    from sae.superposition import EXPERIMENTS, run
    from sae.superposition.report import show

    units = dict.fromkeys(EXPERIMENTS, "inputs")
    with beginning_again("the experiment that was running"), options.progress(units) as progress:
        results = run(out, experiments, seed=seed, progress=progress)
    console = output()
    for experiment in results.values():
        show(experiment, console)
    say(f"{len(results)} experiment{'s' if len(results) > 1 else ''} in {out}")
