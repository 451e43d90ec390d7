"""`sae pull`: download a dictionary of the hub."""

from __future__ import annotations

from pathlib import Path

import click

from sae.console.terminal import say


@click.command()
@click.argument("name", metavar="NAME")
@click.argument("folder", metavar="[FOLDER]", required=False, type=click.Path(path_type=Path))
def pull(name: str, folder: Path | None) -> None:
    """Download a dictionary of the hub.

    NAME is ORGANISATION/REPOSITORY with @REVISION and :PATH if wanted, or RELEASE/DICTIONARY ('sae list' shows them).
    With FOLDER, which is new or empty, the dictionary is written there in our format, with its repository and commit.
    Without, only its files are downloaded into the hub's cache, from where NAME loads with HF_HUB_OFFLINE=1 too. An
    interrupted download continues where it stopped, unless the hub sends the file by Xet.
    """
    from sae.runs.publishing import pull as pull_dictionary

    say(f"{name} in {str(pull_dictionary(name, folder))!r}")
