"""`sae compare`: compare dictionaries on one run's held-out tokens."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import OnDictionary, Options, evaluation_overrides, on_dictionary
from sae.console.terminal import output, say


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="DICTIONARY... [KEY=VALUE]...")
@click.option("--on", type=click.Path(path_type=Path), help="Run that supplies the held-out tokens and the model.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write compare.md and compare.json to.")
@on_dictionary(out=False)
@click.pass_obj
def compare(
    options: Options, arguments: tuple[str, ...], on: Path | None, out: Path | None, given: OnDictionary
) -> None:  # fmt: skip
    """Compare dictionaries side by side.

    DICTIONARY is a run folder, a dictionary's folder, or a name on the hub (see 'sae list'). The first one is the
    baseline for the others. All are measured on the same held-out tokens: those of --on, or of the first run folder in
    the list. Results for these tokens that are already in a run's eval.json are reused. KEY=VALUE overrides settings of
    the run that supplies the tokens: evaluation.*, model.*, harvest.cache, device. An interrupted comparison resumes
    where it stopped.

    With --model and --data, no run is needed: one is made for the first dictionary, as `sae eval` makes it (in
    out=FOLDER), and all are measured on its held-out tokens.
    """
    from sae.evaluation import comparison_tables
    from sae.runs.comparison import READ, compare_folders

    overrides, places = evaluation_overrides(arguments, given)
    with options.progress({READ: "dictionaries"}) as progress:
        comparison = compare_folders(
            places, on=on, out=out, overrides=overrides, progress=progress, model=given.model, data=given.data,
            hook=given.hook, target=given.target,
        )  # fmt: skip
    console = output()
    for table in comparison_tables(comparison, console.width):
        console.print(table, "")
    if out is not None:
        say(f"compare.md and compare.json in {out}")
