"""`sae effects`: what features of a run do to the model."""

from __future__ import annotations

from pathlib import Path

import click

from sae.console.terminal import output

_DRAWN = 200


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, metavar="[FEATURE]... [KEY=VALUE]...")
@click.option("--scale", default=0.0, show_default=True, help="Factor of the activations: 0 ablates, 2 doubles.")
@click.option(
    "--features",
    "drawn",
    default=_DRAWN,
    show_default=True,
    type=click.IntRange(0),
    help="So many, drawn at random from those that fire, where none is named; 0: all of them.",
)
@click.option("--positions", default=64, show_default=True, type=click.IntRange(1), help="Most places of a feature.")
@click.option("--null-positions", default=16, show_default=True, type=click.IntRange(0), help="Most of each null.")
@click.option("--window", default=16, show_default=True, type=click.IntRange(0), help="Following positions summed.")
@click.option("--tokens", default=None, type=click.IntRange(1), help="Held-out tokens read; all where left out.")
@click.option("--sort", default="kl", show_default=True, help="Order of the table.")
@click.option("--limit", default=40, show_default=True, type=click.IntRange(1), help="Rows of the table.")
@click.pass_obj
def effects(
    options: dict[str, bool],
    path: Path,
    arguments: tuple[str, ...],
    scale: float,
    drawn: int,
    positions: int,
    null_positions: int,
    window: int,
    tokens: int | None,
    sort: str,
    limit: int,
) -> None:
    """Measure what features do to the model's predictions.

    Each is ablated (or scaled) on held-out text, at one place at a time where it fires, and the change of the
    next-token loss and distribution is measured there and at the positions after it, beside the first-order effect of
    its direction on the logits, and beside random directions. effects.json, effects.md and a figure are written into
    RUN, a run folder; what is there already, of the same weights, data and settings, is not measured again. KEY=VALUE
    overrides settings of the run: model.*, harvest.cache, device.
    """
    from sae.cli.arguments import features_and_overrides
    from sae.console.progress import progress_bars
    from sae.effects import EffectSettings, measure_effects
    from sae.effects.effects import check_column
    from sae.effects.view import effects_table, summary_lines, table_note
    from sae.runs import pipeline

    check_column(sort)
    indices, overrides = features_and_overrides(arguments, path)
    settings = EffectSettings(scale, positions, null_positions, window, tokens)
    with progress_bars(quiet=options["quiet"], units={"effects": "changes"}) as progress:
        run = pipeline.Run.open(path, overrides, progress)
        measured = measure_effects(
            run.dictionary(),
            run.cache(),
            run.language_model,
            hook=run.config.hook,
            features=indices or None,
            sample=drawn or None,
            settings=settings,
            folder=run.folder,
            device=run.device,
            progress=progress,
        )
    console = output()
    console.print(effects_table(measured, sort, limit, console.width))
    for line in (table_note(measured, sort, limit), *summary_lines(measured)):
        console.print(line)
