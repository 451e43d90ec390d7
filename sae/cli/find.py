"""`sae find`: find a dictionary's features for a concept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from sae.cli.arguments import Options, check_file_name, split_overrides, with_keys
from sae.config.file import CONFIG_YAML
from sae.console.terminal import output, say
from sae.files.writing import json_content, stands, write_bytes


def _keys() -> Iterator[tuple[str, str, str]]:
    from sae.probing.settings import describe_concept_keys

    return describe_concept_keys()


_FILE = click.Path(path_type=Path)


@click.command(cls=with_keys("Settings, as KEY=VALUE", _keys))
@click.argument("path", metavar="RUN", type=_FILE)
@click.argument("arguments", nargs=-1, metavar="[DATA] [KEY=VALUE]...")
@click.option("--with", "having", type=_FILE, help="File of texts with the concept.")
@click.option("--without", "lacking", type=_FILE, help="File of texts without it.")
@click.option("--word", help="Instead: a word, whose tokens are compared with other tokens of the same texts.")
@click.option("--texts", type=_FILE, help="File of texts that have the word.")
@click.option("--model", help="Language model of the dictionary, if RUN is not a run folder.")
@click.option("--json", "json_file", type=_FILE, help="Write the result to this file.")
@click.option("--page", type=_FILE, help="Write a self-contained HTML page to this file.")
@click.pass_obj
def find(
    options: Options,
    path: Path,
    arguments: tuple[str, ...],
    having: Path | None,
    lacking: Path | None,
    word: str | None,
    texts: Path | None,
    model: str | None,
    json_file: Path | None,
    page: Path | None,
) -> None:
    """Find the features that fire where a concept is present.

    The concept is shown by two files of texts, by a word, or by DATA, a .csv, .jsonl or .parquet file with a text and a
    label column (positive=LABEL names the concept). Features are ranked by AUC on one half of the examples, with a p
    value that accounts for the search over all of them, and scored on the other half, next to the best single neuron
    and to searches with shuffled labels.

    A file of texts is a .csv, .jsonl or .parquet file with a column 'text', or plain text: its paragraphs, or its lines
    if it has no empty ones.

    RUN is a run folder; or, with --model, a dictionary's folder. KEY=VALUE may also override settings of the run:
    model.*, harvest.cache, device.
    """
    from sae.probing.concept_view import concept_sheet, concept_table
    from sae.probing.settings import read_concept_overrides
    from sae.runs.concepts import find as find_concept
    from sae.runs.run import Run
    from sae.viewer import write_sheet

    overrides, sources = split_overrides(arguments)
    if len(sources) > 1:
        raise click.UsageError(f"{sources[1]}: one DATA file at a time")
    check_file_name("--json", json_file, "found.json")
    check_file_name("--page", page, "page.html")
    settings, of_run = read_concept_overrides(overrides)
    is_run = stands(path / CONFIG_YAML)
    if of_run and not is_run:
        raise click.UsageError(f"{of_run[0]}: {str(path)!r} is not a run folder, and only a run folder has settings")
    with options.progress() as progress:
        if is_run and model is not None:
            of_run, model = (*of_run, f"model.name={model}"), None
        result = find_concept(
            Run.open(path, of_run, progress) if is_run else path, having, lacking, word=word, texts=texts,
            data=sources[0] if sources else None, model=model, settings=settings, progress=progress,
        )  # fmt: skip
    console = output()
    console.print(concept_table(result, console.width))
    if json_file is not None:
        write_bytes(json_file, json_content(result.to_json()), hashed=False)  # the path can be anywhere
        say(f"result in {json_file}")
    if page is not None:
        write_sheet(concept_sheet(result), page)
        say(f"page in {page}")
