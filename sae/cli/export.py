"""`sae export`: a run's features as files of other viewers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from sae.cli.arguments import OnDictionary, Options, beginning_again, features_and_overrides
from sae.config.file import CONFIG_YAML
from sae.console.terminal import output
from sae.files.printable import one_line
from sae.files.writing import stands

_MOST = 10_000_000
"""Highest feature number that a range may end with."""


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--to", required=True, metavar="VIEWER", help="Whose files to write: neuronpedia or saedashboard.")
@click.option("--features", "numbers", metavar="NUMBERS", help="Which features, such as 0-99,250; all by default.")
@click.option("--set", "set_name", metavar="NAME", help="Name of the set of dictionaries; by default that of the run.")
@click.option("--model", metavar="ID", help="The viewer's id of the language model; by default from the model's name.")
@click.option("--creator", metavar="NAME", help="Who made the dictionary.")
@click.option("--description", metavar="TEXT", help="One line; by default hook point and number of features.")
@click.option(
    "--with-model", is_flag=True, help="Load the language model, for histograms of the effects on its logits."
)
@click.pass_obj
def export(
    options: Options,
    path: Path,
    folder: Path,
    arguments: tuple[str, ...],
    to: str,
    numbers: str | None,
    set_name: str | None,
    model: str | None,
    creator: str | None,
    description: str | None,
    with_model: bool,
) -> None:
    """Write features as files of another viewer.

    RUN is a run folder, whose features are collected first if they are missing, or a feature store. FOLDER is new or
    empty. VIEWER is neuronpedia, for the files that Neuronpedia imports, or saedashboard, for SAEDashboard's JSON.

    What these files have a place for and the run does not hold is left empty and reported. KEY=VALUE overrides settings
    of the run: model.*, harvest.cache, device.
    """
    from sae.features import Features
    from sae.runs.run import Run
    from sae.viewer import export_features

    indices = None if numbers is None else list(_numbers(numbers))
    positional, overrides = features_and_overrides(arguments, path, OnDictionary())
    if positional:
        raise click.UsageError(f"{positional[0]}: give features by --features {positional[0]}")
    run = None
    with beginning_again("it"), options.progress() as progress:
        if stands(path / CONFIG_YAML):
            run = Run.open(path, overrides, progress)
            store = run.features()
        elif overrides or with_model:
            given = overrides[0] if overrides else "--with-model"
            raise click.UsageError(f"{given}: {str(path)!r} is not a run folder, and only a run folder has settings")
        else:
            store = Features(path)
        done = export_features(
            store,
            folder,
            to,
            dictionary=None if run is None else run.dictionary("cpu"),
            language_model=run.language_model if run is not None and with_model else None,
            indices=indices,
            set_name=set_name,
            model=model,
            creator=creator,
            description=description,
        )
    console = output()
    console.print(f"{done.features:,} features as {done.source} of {done.title}: {len(done.files):,} files in {folder}")
    for part in done.missing:
        console.print(f"  left empty: {part}")


def _numbers(text: str) -> Iterator[int]:
    """The numbers of a list such as `0-99,250`.

    Raises:
        BadParameter: it is not such a list.
    """
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdecimal() and len(end) < len(str(_MOST)) for end in ends):
            raise click.BadParameter(
                f"{one_line(part, 100)!r} is neither a feature number nor a range such as 0-99.",
                param_hint="'--features'",
            )
        if int(ends[0]) > int(ends[1]):
            raise click.BadParameter(f"{one_line(part, 100)!r} ends before it begins.", param_hint="'--features'")
        yield from range(int(ends[0]), int(ends[1]) + 1)
