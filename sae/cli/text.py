"""`sae text`: the features of any text."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import click

from sae.cli.arguments import Options, beginning_again, check_file_name
from sae.config.file import READ_BY_RUN, describe_keys
from sae.console.terminal import say
from sae.errors import ConfigError, DataError
from sae.files.printable import one_line

_STANDARD_INPUT = "-"
_MOST_CHARACTERS = 1_000_000
_SETTING = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)=")


@click.command()
@click.argument("path", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, metavar="[TEXT]... [KEY=VALUE]...")
@click.option("--file", "files", multiple=True, type=click.Path(path_type=Path), help="Read a text from this file.")
@click.option(
    "--top",
    default=10,
    show_default=True,
    type=click.IntRange(1),
    help="Number of strongest features of a text in the table or on the page.",
)
@click.option(
    "--per-token", default=3, show_default=True, type=click.IntRange(1), help="Number of strongest features of a token."
)
@click.option("--feature", "features", multiple=True, type=int, help="Show this feature instead; may be repeated.")
@click.option(
    "--max-density",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Omit features that fire on a larger share of tokens, according to the feature store.",
)
@click.option("--page", type=click.Path(path_type=Path), help="Write a self-contained HTML page to this file.")
@click.option("--model", help="The language model, if RUN is not a run folder, or has moved.")
@click.option("--device", help="The device of model and dictionary.")
@click.pass_obj
def text(
    options: Options,
    path: Path,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    top: int,
    per_token: int,
    features: tuple[int, ...],
    max_density: float,
    page: Path | None,
    model: str | None,
    device: str | None,
) -> None:
    """Show the features of any text, at each of its tokens.

    TEXT is a text, or - for standard input, which is read, too, if it is not a terminal and there is no TEXT. RUN is a
    run folder, or any folder with a dictionary, with --model. If it has a feature store, each feature is shown with
    what is known about it. Tokens that were masked out of training, such as BOS, are shown as masked. KEY=VALUE
    overrides settings of the run: model.*, harvest.cache, device.
    """
    check_file_name("--page", page, "page.html")
    overrides, given = settings_and_texts(texts, "give it with --file, or on standard input")
    read = _texts(given, files)
    from sae.features.text_features import text_features
    from sae.runs.in_model import open_in_model
    from sae.viewer.text_page import write_text_page
    from sae.viewer.text_terminal import print_text_features

    with beginning_again("it"), options.progress() as progress:
        opened = open_in_model(path, model, device, progress, overrides=overrides)
        results = [
            text_features(
                opened.dictionary,
                opened.language_model,
                one,
                top=top,
                features=features,
                store=opened.store,
                max_density=max_density,
            )
            for one in read
        ]
    if page is not None:
        write_text_page(results, page, f"Features of a text in {path.name}", per_token=per_token)
        say(f"{len(results):,} {'text' if len(results) == 1 else 'texts'} in {page}")
        return
    for number, result in enumerate(results):
        if number:
            say()
        print_text_features(result, per_token=per_token)


def settings_and_texts(arguments: Iterable[str], way_out: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split arguments into settings of a run, as KEY=VALUE, and texts.

    Args:
        arguments: those that begin with the key of a setting, or with `model.` or `harvest.cache`, and = are settings.
        way_out: what to do if it is a text, for the message.

    Raises:
        ConfigError: a finished run does not read a setting.
    """
    keys = {argument: match[1] for argument in arguments if (match := _SETTING.match(argument))}
    known = {key for key, *_ in describe_keys()} if keys else set()
    groups = tuple(key for key in READ_BY_RUN if "." in key)
    settings = [argument for argument, key in keys.items() if key in known or key.startswith(groups)]
    for setting in settings:
        if not setting.startswith(READ_BY_RUN):
            raise ConfigError(
                f"{one_line(setting, 80)!r}: a setting that a finished run does not read; it reads "
                f"{', '.join(READ_BY_RUN)}. If it is a text, {way_out}"
            )
    return tuple(settings), tuple(argument for argument in arguments if argument not in settings)


def _texts(texts: tuple[str, ...], files: tuple[Path, ...]) -> list[str]:
    """The texts of a command.

    Raises:
        DataError: there is none, one is too long, or a file cannot be read.
    """
    words = texts or ((_STANDARD_INPUT,) if not files and not sys.stdin.isatty() else ())
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # as for files
    read = [sys.stdin.read(_MOST_CHARACTERS + 1) if word == _STANDARD_INPUT else word for word in words]
    for file in files:
        try:
            with file.open(encoding="utf-8", errors="replace") as content:
                read.append(content.read(_MOST_CHARACTERS + 1))
        except OSError as error:
            raise DataError(f"text {str(file)!r}: {error.strerror or error}; give a text file") from error
    if not any(read):
        raise DataError("there is no text: give one after RUN, with --file FILE, or on standard input")
    if any(len(one) > _MOST_CHARACTERS for one in read):
        raise DataError(f"a text has more than {_MOST_CHARACTERS:,} characters: give a part of it")
    return read
