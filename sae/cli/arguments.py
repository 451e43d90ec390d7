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


def show_report(report: Any) -> None:
    """Print the table of an evaluation report, or of the contents of `eval.json`."""
    from sae.evaluation import report_table

    console = output()
    console.print(report_table(report, console.width))


def split_overrides(arguments: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    """The arguments that are KEY=VALUE and do not name a file, and the others."""
    overrides = tuple(argument for argument in arguments if "=" in argument and not Path(argument).exists())
    return overrides, [argument for argument in arguments if argument not in overrides]


def evaluation_overrides(arguments: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Split arguments into overrides and the rest.

    Raises:
        ConfigError: evaluation does not read an override.
    """
    overrides, others = split_overrides(arguments)
    _check_read(overrides, _READ_BY_EVALUATION, "evaluation does not read")
    return overrides, others


def features_and_overrides(arguments: tuple[str, ...], path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Split arguments into feature numbers and overrides, for a command that opens the run folder `path`.

    Raises:
        click.BadParameter: an argument is neither.
        ConfigError: an existing run does not read an override.
    """
    overrides, numbers = split_overrides(arguments)
    _check_read(overrides, READ_BY_RUN, f"the existing run {str(path)!r} does not read")
    for argument in numbers:
        if not argument.removeprefix("-").isdecimal() or len(argument) > _LONGEST_NUMBER:
            raise click.BadParameter(
                f"{one_line(argument, 100)!r} is neither a feature number nor KEY=VALUE.",
                param_hint="'[FEATURE]...'",
            )
    return tuple(map(int, numbers)), overrides


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
