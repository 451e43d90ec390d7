"""`sae superposition`: toy models, and dictionaries on activations whose features are known."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import beginning_again
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
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, LARGEST), help="Seed of everything random."
)
@click.pass_obj
def superposition(options: dict[str, bool], experiments: tuple[str, ...], out: Path, seed: int) -> None:
    """Train toy models of superposition, and dictionaries whose true features are known.

    EXPERIMENT is one or several of: geometry, dimensionality, phases-2-1, phases-3-2, recovery-toy, recovery-even,
    recovery-hard; without any, all of them. superposition.json, superposition.md and a figure for each are written
    into the folder. What it holds already is not run again, so that an interruption loses only the experiment that was
    running.
    """
    from sae.console.progress import progress_bars
    from sae.superposition import EXPERIMENTS, run
    from sae.superposition.report import show

    bars = progress_bars(quiet=options["quiet"], units=dict.fromkeys(EXPERIMENTS, "inputs"))
    with beginning_again("the experiment that was running"), bars as progress:
        done = run(out, experiments, seed=seed, progress=progress)
    console = output()
    for experiment in done.values():
        show(experiment, console)
    say(f"{len(done)} experiment{'s' if len(done) > 1 else ''} in {out}")
