"""`sae replace`: the language model with its modules replaced by transcoders."""

from __future__ import annotations

from pathlib import Path

import click

from sae.cli.arguments import OnDictionary, Options, evaluation_overrides
from sae.console.terminal import output, say


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="RUN... [KEY=VALUE]...")
@click.option("--on", type=click.Path(path_type=Path), help="Run that supplies the held-out tokens and the model.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write replacement.md and replacement.json to.")
@click.option("--model", help="For transcoders without a run: their language model; else the one their files name.")
@click.option("--data", multiple=True, metavar="TEXTS", help="For transcoders without a run: texts, as in data.source.")
@click.pass_obj
def replace(
    options: Options, arguments: tuple[str, ...], on: Path | None, out: Path | None, model: str | None,
    data: tuple[str, ...],
) -> None:  # fmt: skip
    """Replace modules of the model by transcoders, and measure its loss.

    RUN is a transcoder's folder, or a folder of several transcoders, such as a sweep or a circuit-tracer set; each
    gives another module's output. The loss is measured with all modules replaced together, so that each transcoder
    reads what the others have changed, and with one module replaced at a time. Both are measured again with the
    transcoders' skip connections alone, the best affine maps, means, and zeros in their place.

    Held-out tokens and model are those of --on, or of the first run folder in the list. With --model and --data, no run
    is needed: one is made for the first transcoder, as `sae eval` makes it. replacement.json and replacement.md are
    written into --out, or into RUN if it is a single run or sweep. KEY=VALUE overrides settings of the run that
    supplies the tokens: evaluation.*, model.*, harvest.cache, device. An interrupted measurement resumes where it
    stopped.
    """
    from sae.evaluation import replacement_tables
    from sae.runs.comparison import READ
    from sae.runs.replacement import out_folder
    from sae.runs.replacement import replace as replace_modules

    overrides, places = evaluation_overrides(arguments, OnDictionary(model=model, data=data))
    if not places:
        raise click.UsageError("name at least one run folder before the overrides")
    with options.progress({READ: "dictionaries"}) as progress:
        report = replace_modules(
            places, on=on, out=out, overrides=overrides, model=model, data=data, progress=progress
        )  # fmt: skip
    console = output()
    for table in replacement_tables(report, console.width):
        console.print(table, "")
    folder = out_folder(places, out)
    if folder is not None:
        say(f"replacement.md and replacement.json in {folder}")
