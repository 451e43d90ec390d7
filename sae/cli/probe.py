"""`sae probe`: sparse probes on a run's latents, compared with dense ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from sae.cli.arguments import OnDictionary, Options, on_dictionary, split_overrides, with_keys
from sae.console.terminal import output, say
from sae.errors import SaeError


def _keys() -> Iterator[tuple[str, str, str]]:
    from sae.probing.settings import describe_keys

    return describe_keys()


@click.command(cls=with_keys("Settings, as KEY=VALUE", _keys))
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, metavar="[DATA]... [KEY=VALUE]...")
@on_dictionary()
@click.pass_obj
def probe(options: Options, path: Path, arguments: tuple[str, ...], given: OnDictionary) -> None:
    """Probe a dictionary for labels.

    Logistic regressions on 1, 2, 5, 16 and all latents are compared with regressions on the same number of neurons, on
    principal components and on the whole activation, and with the majority class and shuffled labels. probe.json and
    probe.md are written into RUN, a run folder; existing results are reused.

    DATA is a .csv, .jsonl or .parquet file with a text and a label column, or a folder of such files; 'sae-probes' (the
    default) for the 113 data sets of that package, or the folder that its wheel was unpacked to; or 'first-letters' for
    splitting and absorption of the first letters of words.

    With --model and --data, RUN is any dictionary; see `sae eval`.
    """
    from sae.probing.data import SAE_PROBES, find_data
    from sae.probing.record import FIRST_LETTERS, MARKDOWN_FILE
    from sae.probing.render import letters_table, summary_table
    from sae.probing.settings import read_overrides
    from sae.runs.opening import open_run
    from sae.runs.probes import probe_run

    overrides, sources = split_overrides(arguments)
    sources = sources or [SAE_PROBES]
    to_make = tuple(word for word in overrides if given.makes_run and word.startswith(("data.", "harvest.", "out=")))
    settings = read_overrides([word for word in overrides if word not in to_make])
    data = find_data([source for source in sources if source != FIRST_LETTERS])
    with options.progress({"probes": "data sets"}) as progress:
        run = open_run(path, (*settings.of_run, *to_make), **given.arguments, progress=progress)
        record = probe_run(run, data, settings.probes, letters=settings.letters if FIRST_LETTERS in sources else None)
    console = output()
    if record.results:
        console.print(summary_table(record, console.width))
    if record.letters is not None:
        console.print(letters_table(record, console.width))
    say(f"{len(record.entries) - len(record.failures)} probed; tables in {run.folder / MARKDOWN_FILE}")
    if record.failures:
        raise SaeError(f"{len(record.failures)} data sets were not probed; {MARKDOWN_FILE} says why")
