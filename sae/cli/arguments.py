"""What verbs share: CONFIG and KEY=VALUE, folders and features, keys in the help, and what Ctrl-C says."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from sae.config.file import describe_keys, load_config, named_config
from sae.config.settings import RunConfig
from sae.console.terminal import complain, output
from sae.errors import ConfigError
from sae.files.paths import expanded
from sae.files.printable import one_line
from sae.files.writing import stands

_LONGEST_KEY = 80
_LONGEST_NUMBER = 18
_READ_BY_RUN = ("model.", "harvest.cache", "device")
_READ_BY_EVALUATION = ("evaluation.", *_READ_BY_RUN)

Keys = Callable[[], Iterable[tuple[str, str, str]]]


def with_keys(title: str, keys: Keys) -> type[click.Command]:
    """A kind of command whose help ends with keys, their defaults and what they mean.

    Args:
        title: of the list.
        keys: gives key, default and description of each; called for the help alone.
    """

    class Command(click.Command):
        def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            super().format_epilog(ctx, formatter)
            with formatter.section(title):
                rows = [(f"{key}={default}"[:_LONGEST_KEY], text) for key, default, text in keys()]
                formatter.write_dl(rows, col_max=34)

    return Command


OfConfiguration = with_keys("Keys, for the file and as KEY=VALUE", describe_keys)
"""A command on a configuration, whose help lists every setting."""


def configured(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command its `settings`, from a YAML file, KEY=VALUE arguments, or both."""

    @functools.wraps(command)
    def with_settings(*given: Any, arguments: tuple[str, ...], **options: Any) -> Any:
        first, *overrides = arguments
        no_file = "=" in first and not stands(expanded(first))
        settings = load_config(None, arguments) if no_file else named_config(Path(first), overrides)
        return command(*given, settings=settings, **options)

    return click.argument("arguments", nargs=-1, required=True, metavar="[CONFIG] [KEY=VALUE]...")(with_settings)


def say_hook(settings: RunConfig, *, quiet: bool) -> None:
    """Which hook point is trained on, if several are harvested and none is named."""
    if settings.hook_note and not quiet:
        complain(settings.hook_note)


def show_report(report: Any) -> None:
    """The table of an evaluation, or of what `eval.json` holds of it."""
    from sae.evaluation import report_table

    console = output()
    console.print(report_table(report, console.width))


def evaluation_overrides(arguments: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The overrides, and the rest, among arguments.

    Raises:
        ConfigError: an override that evaluation does not read.
    """
    overrides = _overrides(arguments, _READ_BY_EVALUATION, "evaluation does not read")
    return overrides, [argument for argument in arguments if argument not in overrides]


def features_and_overrides(arguments: tuple[str, ...], path: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The numbers of features, and the overrides, among arguments of a verb that opens the run folder `path`.

    Raises:
        click.BadParameter: one is neither.
        ConfigError: an override that a run that is there does not read.
    """
    overrides = _overrides(arguments, _READ_BY_RUN, f"{str(path)!r} is made, and nothing of it reads")
    numbers = [argument for argument in arguments if argument not in overrides]
    for argument in numbers:
        if not argument.removeprefix("-").isdecimal() or len(argument) > _LONGEST_NUMBER:
            raise click.BadParameter(
                f"{one_line(argument, 100)!r} is neither the number of a feature nor KEY=VALUE.",
                param_hint="'[FEATURE]...'",
            )
    return tuple(map(int, numbers)), overrides


def _overrides(arguments: tuple[str, ...], read: tuple[str, ...], refusal: str) -> tuple[str, ...]:
    overrides = tuple(argument for argument in arguments if "=" in argument and not Path(argument).exists())
    for override in overrides:
        if not override.startswith(read):
            key = override.partition("=")[0]
            raise ConfigError(
                f"override {override!r}: {refusal} {key}; it reads {', '.join(read)}: "
                "train another run to change what was trained"
            )
    return overrides


@contextlib.contextmanager
def beginning_again(work: str) -> Iterator[None]:
    """While open, Ctrl-C says that this work begins again instead of going on where it was.

    Raises:
        Abort: Ctrl-C.
    """
    try:
        yield
    except (KeyboardInterrupt, click.Abort) as stopped:
        raise click.Abort(f"interrupted; the same command begins {work} again") from stopped
