"""`sae effects`: measure what a run's features do to the model."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import OnDictionary, Options, features_and_overrides, on_dictionary
from sae.console.terminal import output


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, metavar="[FEATURE]... [KEY=VALUE]...")
@click.option(
    "--scale", default=0.0, show_default=True, help="Factor applied to a feature's activations: 0 ablates, 2 doubles."
)
@click.option(
    "--features",
    "sample",
    default=200,
    show_default=True,
    type=click.IntRange(0),
    help="If no FEATURE is given: number of firing features to sample at random, or 0 for all.",
)
@click.option(
    "--positions",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Maximum number of positions per feature.",
)
@click.option(
    "--null-positions",
    default=16,
    show_default=True,
    type=click.IntRange(0),
    help="Maximum number of positions for each null.",
)
@click.option(
    "--window", default=16, show_default=True, type=click.IntRange(0), help="Number of following positions to sum over."
)
@click.option("--tokens", default=None, type=click.IntRange(1), help="Held-out tokens to read; all by default.")
@click.option(
    "--sort",
    default="kl",
    show_default=True,
    help="Sort the table by kl, loss, kl_after, loss_after, direct, density, positions or feature.",
)
@click.option(
    "--limit", default=40, show_default=True, type=click.IntRange(1), help="Maximum number of rows in the table."
)
@on_dictionary()
@click.pass_obj
def effects(
    options: Options,
    path: Path,
    arguments: tuple[str, ...],
    scale: float,
    sample: int,
    positions: int,
    null_positions: int,
    window: int,
    tokens: int | None,
    sort: str,
    limit: int,
    given: OnDictionary,
) -> None:
    """Measure what features do to the model's predictions.

    Each feature is ablated (or scaled) on held-out text, at one position at a time where it fires. The change in
    next-token loss and distribution is measured there and at the following positions, and compared with the first-order
    effect of the feature's direction on the logits and with random directions. A transcoder's features fire where it
    reads, and are ablated in what it gives. effects.json, effects.md and a figure
    are written into RUN, a run folder. Existing results for the same weights, data and settings are reused. KEY=VALUE
    overrides settings of the run: model.*, harvest.cache, device.

    With --model and --data, RUN is any dictionary; see `sae eval`.
    """
    from sae.effects import EffectSettings, measure_effects
    from sae.effects.effects import check_column
    from sae.effects.view import effects_table, summary_lines, table_note
    from sae.runs.opening import open_run

    check_column(sort)
    indices, overrides = features_and_overrides(arguments, path, given)
    settings = EffectSettings(scale, positions, null_positions, window, tokens)
    with options.progress({"effects": "changes"}) as progress:
        run = open_run(path, overrides, **given.arguments, progress=progress)
        results = measure_effects(
            run.dictionary(),
            run.cache(),
            run.language_model,
            hook=run.config.gives,
            features=indices or None,
            sample=sample or None,
            settings=settings,
            folder=run.folder,
            device=run.device,
            progress=progress,
        )
    console = output()
    table, note = effects_table(results, sort, limit, console.width), table_note(results, sort, limit)
    console.print(table, note, *summary_lines(results), sep="\n")
