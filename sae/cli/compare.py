"""`sae compare`: several dictionaries side by side, on one run's held-out tokens."""

from __future__ import annotations

from pathlib import Path

import click

from sae.console.terminal import output, say


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="DICTIONARY... [KEY=VALUE]...")
@click.option("--on", type=click.Path(path_type=Path), help="Run whose held-out tokens and model are used.")
@click.option("--out", type=click.Path(path_type=Path), help="Write compare.md and compare.json into this folder.")
@click.pass_obj
def compare(options: dict[str, bool], arguments: tuple[str, ...], on: Path | None, out: Path | None) -> None:
    """Set dictionaries side by side.

    DICTIONARY is a run folder or a dictionary's folder; the first is what the others are compared with. All are
    measured on the same held-out tokens: those of the first run folder among them, or of --on. What a run has measured
    on these already is taken from its eval.json. KEY=VALUE overrides settings of the run that the tokens are of:
    evaluation.*, model.*, harvest.cache, device. A comparison that was interrupted goes on where it stopped.
    """
    from sae.cli.arguments import evaluation_overrides
    from sae.console.progress import progress_bars
    from sae.evaluation import comparison_tables
    from sae.runs.comparison import READ, compare_folders

    overrides, places = evaluation_overrides(arguments)
    with progress_bars(quiet=options["quiet"], units={READ: "dictionaries"}) as progress:
        comparison = compare_folders(places, on=on, out=out, overrides=overrides, progress=progress)
    console = output()
    for table in comparison_tables(comparison, console.width):
        console.print(table, "")
    if out is not None:
        say(f"compare.md and compare.json in {out}")
