"""`sae attribute`: which features a logit comes from, at every token of a text."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import Options, beginning_again, check_file_name, run_overrides
from sae.console.terminal import output


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("text", metavar="TEXT")
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--model", help="The language model, if RUN is not a run folder.")
@click.option("--token", help="Next token, with the space before it; by default the most likely one.")
@click.option("--minus", help="Another next token, whose logit is subtracted.")
@click.option(
    "--position", default=-1, show_default=True, help="Token after which the next one is predicted, from 0 with BOS."
)
@click.option("--log-probability", is_flag=True, help="Attribute the token's log-probability instead of its logit.")
@click.option(
    "--method",
    type=click.Choice(["gradient_activation", "integrated_gradients"]),
    help="How to attribute; by default gradient_activation, or integrated_gradients if --steps or --groups are given.",
)
@click.option("--steps", type=click.IntRange(1, 1000), help="Gradients along the path of integrated gradients (16).")
@click.option("--groups", type=click.IntRange(1, 1000), help="Groups of features, each on a path of its own (1).")
@click.option("--errors", is_flag=True, help="Attribute to what the dictionary does not explain, too.")
@click.option("--by-feature", is_flag=True, help="Add up the positions of each feature.")
@click.option("--top", default=20, show_default=True, type=click.IntRange(1), help="Number of rows in the table.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write all attributions to this file.")
@click.pass_obj
def attribute(
    options: Options,
    path: Path,
    text: str,
    arguments: tuple[str, ...],
    model: str | None,
    token: str | None,
    minus: str | None,
    position: int,
    log_probability: bool,
    method: str | None,
    steps: int | None,
    groups: int | None,
    errors: bool,
    by_feature: bool,
    top: int,
    file: Path | None,
) -> None:
    """Show which features a prediction comes from.

    The logit of a next token, a difference of two logits or a log-probability is attributed to the features that fire
    on TEXT, at every position. The table has the largest attributions, with the tokens that each feature fires on if
    the features of RUN, a run folder, have been collected. Below it stands how exactly all attributions add up.
    RUN may also be any dictionary, with --model. KEY=VALUE overrides settings of the run: model.*, harvest.cache,
    device.
    """
    from sae.effects import NextToken
    from sae.effects import attribute as attribute_features
    from sae.effects.attribution_view import attribution_table, completeness_lines, totals_table
    from sae.features.store import store_of
    from sae.runs.opening import open_run
    from sae.viewer.terminal import in_colour

    overrides = run_overrides(arguments, path)
    check_file_name("--json", file, "a.json")
    target = NextToken(token, minus, position, log_probability)
    with beginning_again("it"), options.progress({"attribute": "gradients"}) as progress:
        run = open_run(path, overrides, model=model, needs_texts=False, progress=progress)
        result = attribute_features(
            run.dictionary(), run.language_model, text, of=target, method=method, steps=steps, groups=groups,
            error_term=errors, progress=progress,
        )  # fmt: skip
        store = store_of(run.folder / "features", result.dictionaries[0].weights_sha256)
    if file is not None:
        result.save(file)
    console = output()
    table = (totals_table if by_feature else attribution_table)(
        result, top, {} if store is None else {run.config.gives: store}, colour=in_colour(console)
    )
    lines = completeness_lines(result)
    if store is None:
        lines.append(f"What features fire on is shown once they are collected: sae features {path}")
    console.print(table.in_terminal(console.width), *lines, sep="\n")
