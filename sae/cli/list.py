"""`sae list`: the releases of dictionaries on the hub, and the dictionaries of one."""

from __future__ import annotations

import click

from sae.cli.arguments import beginning_again
from sae.console.terminal import output


@click.command(name="list")
@click.argument("name", metavar="[RELEASE]", required=False)
def list(name: str | None) -> None:
    """List dictionaries on the hub.

    RELEASE is the name of a release, or ORGANISATION/REPOSITORY with @REVISION and :PATH if wanted; without it, the
    releases that have a name are listed. The table has the id of each dictionary, which follows RELEASE/ or REPOSITORY:
    in a name, and the L0 and explained variance that were published with it, marked as theirs. At most 64 small files
    are downloaded.
    """
    from sae.runs.catalogue import dictionaries_table, releases_table

    console = output()
    with beginning_again("it"):
        table = releases_table(console.width) if name is None else dictionaries_table(name, console.width)
    console.print(table)
