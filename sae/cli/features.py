"""`sae features`: list features, show the contexts they fire in, or write a page of them."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import OnDictionary, Options, beginning_again, features_and_overrides, on_dictionary
from sae.config.file import CONFIG_YAML
from sae.console.terminal import say
from sae.files.writing import stands


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, metavar="[FEATURE]... [KEY=VALUE]...")
@click.option(
    "--sort", default="density", show_default=True, help="Sort the list by density, max, count, index or mean."
)
@click.option(
    "--limit",
    default=40,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of features in the list or page.",
)
@click.option(
    "--max-density",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Omit features that fire on a larger share of tokens.",
)
@click.option("--page", type=click.Path(path_type=Path), help="Write a self-contained HTML page to this file.")
@on_dictionary()
@click.pass_obj
def features(
    options: Options,
    path: Path,
    arguments: tuple[str, ...],
    sort: str,
    limit: int,
    max_density: float,
    page: Path | None,
    given: OnDictionary,
) -> None:
    """Show what features fire on.

    Without FEATURE, list the features. With feature numbers, show the contexts in which those features fire. With
    --page, write a page of them.

    RUN is a run folder or a feature store. The features of a run are collected first if they are missing. KEY=VALUE
    overrides settings of the run: model.*, harvest.cache, device.

    With --model and --data, RUN is any dictionary; see `sae eval`.
    """
    from sae.effects import effects_beside
    from sae.features import Features
    from sae.runs.opening import open_run
    from sae.viewer import print_feature, print_features, write_page

    indices, overrides = features_and_overrides(arguments, path, given)
    if page is not None and (not page.name or page.is_dir()):
        raise click.BadParameter(
            f"{str(page)!r} is not a file name; give one, such as page.html.", param_hint="'--page'"
        )
    if stands(path / CONFIG_YAML) or given != OnDictionary():
        with beginning_again("it"), options.progress() as progress:
            store = open_run(path, overrides, **given.arguments, progress=progress).features()
    elif overrides:
        raise click.UsageError(f"{overrides[0]}: {str(path)!r} is not a run folder, and only a run folder has settings")
    else:
        store = Features(path)
    if page is not None:
        chosen = list(indices) or store.sorted_by(sort, max_density=max_density)[:limit]
        write_page(store, chosen, page, f"Features of {path.name}", effects_beside(store))
        say(f"{len(chosen):,} features in {page}")
    elif indices:
        effects = effects_beside(store)
        for index in indices:
            print_feature(store[index], effects=effects)
    else:
        print_features(store, sort=sort, limit=limit, max_density=max_density)
