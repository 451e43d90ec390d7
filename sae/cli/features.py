"""`sae features`: list features, show the contexts they fire in, or write a page of them."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import (
    OnDictionary,
    Options,
    beginning_again,
    check_file_name,
    features_and_overrides,
    on_dictionary,
)
from sae.config.file import CONFIG_YAML
from sae.console.terminal import say
from sae.errors import SaeError
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
@click.option("--search", help="Only features that match this token, part of a token, label or number; says why.")
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
    search: str | None,
    page: Path | None,
    given: OnDictionary,
) -> None:
    """Show what features fire on.

    Without FEATURE, list the features. With feature numbers, show the contexts in which those features fire. With
    --search, list those that fire on a token, promote or suppress it, or have it in their label. With --page, write a
    page of them. Labels are read from labels.json ({"123": "names of cities"}) or labels.csv (feature,label) in RUN.

    RUN is a run folder or a feature store. The features of a run are collected first if they are missing. KEY=VALUE
    overrides settings of the run: model.*, harvest.cache, device.

    With --model and --data, RUN is any dictionary; see `sae eval`.
    """
    from sae.effects import effects_beside
    from sae.features import Features
    from sae.runs.opening import open_run
    from sae.viewer import print_feature, print_features, print_hits, write_page

    indices, overrides = features_and_overrides(arguments, path, given)
    if search is not None and (indices or not search.strip()):
        raise click.UsageError("--search takes a token, a label or a number, and no FEATURE next to it")
    check_file_name("--page", page, "page.html")
    if stands(path / CONFIG_YAML) or given != OnDictionary():
        with beginning_again("it"), options.progress() as progress:
            store = open_run(path, overrides, **given.arguments, progress=progress).features()
    elif overrides:
        raise click.UsageError(f"{overrides[0]}: {str(path)!r} is not a run folder, and only a run folder has settings")
    else:
        store = Features(path)
    hits = []
    if search is not None:
        hits, density = store.search(search), store.summary().density.tolist()
        if not hits:
            raise SaeError(
                f"search {search!r}: no feature fires on it, promotes it, suppresses it or has it in its label; try a "
                "part of the token"
            )
        hits = [hit for hit in hits if density[hit.feature] <= max_density]
        indices = tuple(hit.feature for hit in hits[:limit])
    if page is not None:
        in_order = indices or search is not None
        chosen = list(indices) if in_order else store.sorted_by(sort, max_density=max_density)[:limit]
        write_page(store, chosen, page, f"Features of {path.name}", effects_beside(store))
        say(f"{len(chosen):,} features in {page}")
    elif search is not None:
        print_hits(store, hits, limit=limit)
    elif indices:
        effects = effects_beside(store)
        for index in indices:
            print_feature(store[index], effects=effects, label=store.labels.get(index))
    else:
        print_features(store, sort=sort, limit=limit, max_density=max_density)
