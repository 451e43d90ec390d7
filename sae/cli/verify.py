"""`sae verify`: compare every file of a folder with its hash, and read it."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import Options, beginning_again
from sae.console.terminal import complain, say
from sae.errors import SaeError


@click.command()
@click.argument("paths", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--record", is_flag=True, help="Add hashes for files that an older sae wrote without them.")
@click.pass_obj
def verify(options: Options, paths: tuple[Path, ...], record: bool) -> None:
    """Check every file of a run, a cache or a dictionary.

    FOLDER is a run folder, a cache, a dictionary's folder or a feature store. Every file that sae wrote there is
    compared with its hash and read. Files that are missing, damaged or contradict each other are reported. Linked
    folders are followed, and the cache named by a run's harvest.cache is checked too.
    """
    from sae.runs.verification import record_hashes
    from sae.runs.verification import verify as verify_folder

    files, problems = 0, []
    for path in paths:
        with beginning_again("it"), options.progress({"verify": "files"}) as progress:
            count, folder_problems = verify_folder(path, progress)
        files, problems = files + count, [*problems, *folder_problems]
        if record and not folder_problems:
            say(f"{len(record_hashes(path))} hashes added in {path}")
    for problem in problems:
        complain(problem)
    if problems:
        raise SaeError(f"{len(problems)} problems in {files} files; each line above names a file and how to repair it")
    say(f"{files} files are intact")
