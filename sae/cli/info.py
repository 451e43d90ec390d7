"""`sae info`: what the dictionaries in folders are."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import beginning_again
from sae.console.terminal import output


@click.command()
@click.argument("paths", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
def info(paths: tuple[Path, ...]) -> None:
    """Show what dictionaries are.

    FOLDER is a dictionary's folder, a run folder that holds one, or a name on the hub (see 'sae list'). A table
    shows architecture and settings, sizes, number type, hook points, language model, tokens of training, dead features,
    and the version of sae. No language model is loaded, and no weights of dictionaries in our own format.
    """
    from sae.runs.information import information_table

    console = output()
    with beginning_again("it"):
        table = information_table(paths, console.width)
    console.print(table)
