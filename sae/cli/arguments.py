"""Shared by the commands: CONFIG and KEY=VALUE, feature numbers, settings in the help, Ctrl-C messages."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sae.config.file import READ_BY_RUN, describe_keys, load_config
from sae.config.progress import Progress
from sae.console.terminal import output
from sae.errors import ConfigError
from sae.files.paths import expanded
from sae.files.printable import one_line
from sae.files.writing import stands

_LONGEST_KEY = 80
_LONGEST_NUMBER = 18
_READ_BY_EVALUATION = ("evaluation.", *READ_BY_RUN)
_READ_TO_MAKE = ("model.", "data.", "harvest.", "evaluation.", "features.", "seed", "device", "out=")
"""Settings of a run that is made for a dictionary, by the beginnings of their keys."""

Keys = Callable[[], Iterable[tuple[str, str, str]]]


@dataclass(frozen=True)
class Options:
    """Options of `sae` itself, which every command takes.

    Attributes:
        quiet: show neither progress nor notes.
    """

    quiet: bool

    def progress(self, units: Mapping[str, str] | None = None) -> AbstractContextManager[Progress]:
        """Show the progress of a command, see `progress_bars`."""
        from sae.console.progress import progress_bars

        return progress_bars(quiet=self.quiet, units=units)


def with_keys(title: str, keys: Keys) -> type[click.Command]:
    """A command class whose help ends with a list of settings, their defaults and descriptions.

    Args:
        title: heading of the list.
        keys: returns key, default and description of each setting; called only to show the help.
    """

    class Command(click.Command):
        def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            super().format_epilog(ctx, formatter)
            with formatter.section(title):
                rows = [(f"{key}={default}"[:_LONGEST_KEY], text) for key, default, text in keys()]
                formatter.write_dl(rows, col_max=34)

    return Command


OfConfiguration = with_keys("Settings, in CONFIG or as KEY=VALUE", describe_keys)
"""A command that takes a configuration; its help lists every setting."""


def configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """Pass `settings` to a command, read from a YAML file or shipped configuration, KEY=VALUE arguments, or both."""

    @functools.wraps(command)
    def with_settings(*positional: Any, arguments: tuple[str, ...], **options: Any) -> Any:
        first, *overrides = arguments
        no_file = "=" in first and not stands(expanded(first))
        settings = load_config(None, arguments) if no_file else load_config(first, overrides)
        return command(*positional, settings=settings, **options)

    return click.argument("arguments", nargs=-1, required=True, metavar="[CONFIG] [KEY=VALUE]...")(with_settings)


@dataclass(frozen=True)
class OnDictionary:
    """Options that let a command for run folders take any dictionary; the arguments of `sae.open_run`.

    Attributes:
        model, data, hook, target, out: as given.
    """

    model: str | None = None
    data: tuple[str, ...] = ()
    hook: str | None = None
    target: str | None = None
    out: Path | None = None

    @property
    def makes_run(self) -> bool:
        """Whether a run folder is made, so that the settings that it is made with can be given."""
        return bool(self.data)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of `sae.open_run`."""
        return {**vars(self), "data": self.data or None}


def on_dictionary(*, out: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Pass `given`, an `OnDictionary`, to a command.

    Args:
        out: whether the command has an option for the run folder.
    """
    options = [
        click.option(
            "--model", help="For a dictionary without a run: its language model; else the one its files name."
        ),
        click.option(
            "--data", multiple=True, metavar="TEXTS", help="For a dictionary without a run: texts, as in data.source."
        ),
        click.option("--hook", help="For a dictionary whose files do not say it: the hook point that it reads."),
        click.option("--target", help="Likewise, for a transcoder: the hook point that it gives."),
    ]
    if out:
        folder = click.Path(path_type=Path)
        options.append(
            click.option("--out", type=folder, help="For a dictionary without a run: the run folder to make.")
        )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_given(*positional: Any, **arguments: Any) -> Any:
            names = ("model", "data", "hook", "target", *(["out"] if out else []))
            given = OnDictionary(**{name: arguments.pop(name) for name in names})
            return command(*positional, given=given, **arguments)

        for option in reversed(options):
            with_given = option(with_given)
        return with_given

    return decorate


def show_report(report: Any) -> None:
    """Print the table of an evaluation report, or of the contents of `eval.json`."""
    from sae.evaluation import report_table

    console = output()
    console.print(report_table(report, console.width))


def split_overrides(arguments: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    """The arguments that are KEY=VALUE and do not name a file, and the others."""
    overrides = tuple(argument for argument in arguments if "=" in argument and not Path(argument).exists())
    return overrides, [argument for argument in arguments if argument not in overrides]


def evaluation_overrides(arguments: tuple[str, ...], given: OnDictionary) -> tuple[tuple[str, ...], list[str]]:
    """Split arguments into overrides and the rest.

    Raises:
        ConfigError: neither evaluation nor a run that is made reads an override.
    """
    overrides, others = split_overrides(arguments)
    if given.makes_run:
        check_read_to_make(overrides)
    else:
        _check_read(overrides, _READ_BY_EVALUATION, "evaluation does not read")
    return overrides, others


def check_read_to_make(overrides: Iterable[str]) -> None:
    """Raise ConfigError unless a run that is made for a dictionary reads these overrides."""
    _check_read(overrides, _READ_TO_MAKE, "the run of a finished dictionary does not read")


def features_and_overrides(
    arguments: tuple[str, ...], path: Path, given: OnDictionary
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Split arguments into feature numbers and overrides, for a command that opens the run folder `path`.

    Raises:
        click.BadParameter: an argument is neither.
        ConfigError: an existing run does not read an override.
    """
    overrides, numbers = split_overrides(arguments)
    if given.makes_run:
        check_read_to_make(overrides)
    else:
        _check_read(overrides, READ_BY_RUN, f"the existing run {str(path)!r} does not read")
    for argument in numbers:
        if not argument.removeprefix("-").isdecimal() or len(argument) > _LONGEST_NUMBER:
            raise click.BadParameter(
                f"{one_line(argument, 100)!r} is neither a feature number nor KEY=VALUE.",
                param_hint="'[FEATURE]...'",
            )
    return tuple(map(int, numbers)), overrides


def run_overrides(arguments: tuple[str, ...], path: Path) -> tuple[str, ...]:
    """The arguments as overrides, for a command that opens the run folder `path`.

    Raises:
        click.BadParameter: an argument is not KEY=VALUE.
        ConfigError: an existing run does not read an override.
    """
    overrides, others = split_overrides(arguments)
    _check_read(overrides, READ_BY_RUN, f"the existing run {str(path)!r} does not read")
    for argument in others:
        raise click.BadParameter(
            f"{one_line(argument, 100)!r} is not KEY=VALUE; put the text into quotes.", param_hint="'[KEY=VALUE]...'"
        )
    return overrides


def check_file_name(option: str, file: Path | None, example: str) -> None:
    """Refuse a path that no file can be written to, before the work begins.

    Args:
        option: it was given with, such as `--page`.
        file: the path; None: the option was not given.
        example: a file name, for the message.

    Raises:
        click.BadParameter: it is a folder, or has no name.
    """
    if file is not None and (not file.name or file.is_dir()):
        raise click.BadParameter(
            f"{str(file)!r} is not a file name; give one, such as {example}.", param_hint=f"'{option}'"
        )


def _check_read(overrides: Iterable[str], read: tuple[str, ...], refusal: str) -> None:
    for override in overrides:
        if not override.startswith(read):
            key = override.partition("=")[0]
            raise ConfigError(
                f"override {override!r}: {refusal} {key}; it reads {', '.join(read)}; "
                "train another run to change anything else"
            )


@contextlib.contextmanager
def beginning_again(work: str) -> Iterator[None]:
    """While open, Ctrl-C says that running the command again restarts this work instead of resuming it.

    Raises:
        Abort: Ctrl-C.
    """
    try:
        yield
    except (KeyboardInterrupt, click.Abort) as stopped:
        raise click.Abort(f"interrupted; run the same command again to restart {work}") from stopped
