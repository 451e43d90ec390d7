"""`sae push`: upload a dictionary to the hub."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import beginning_again
from sae.console.terminal import output


@click.command()
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.argument("name", metavar="NAME")
@click.option("--private", is_flag=True, help="Create a private repository; an existing public one is refused.")
@click.option("--licence", "--license", metavar="LICENCE", help="Licence of the dictionary, such as mit, for its page.")
def push(folder: Path, name: str, private: bool, licence: str | None) -> None:
    """Upload a dictionary to the hub.

    FOLDER is a run folder or a dictionary's folder. NAME is ORGANISATION/REPOSITORY, which is created if it does not
    exist, with :PATH for a folder in it; without, that is called as the hook point.

    Uploaded in one commit are the dictionary's files, SAELens's next to them if it has the architecture, and a page,
    README.md, with the run's report, a figure, ten features, the licence, and how to load it. Log in with
    'hf auth login', or set HF_TOKEN.
    """
    from sae.runs.publishing import push as push_dictionary

    with beginning_again("it"):
        published = push_dictionary(folder, name, private=private, licence=licence)
    console = output()
    console.print(published.name)
    console.print(f"  page {published.url}")
    console.print(f"  commit {published.commit[:12]}")
    for file in published.files:
        console.print(f"  file {file}")
    for note in published.notes:
        console.print(f"note: {note}")
