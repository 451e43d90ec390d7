"""Arguments of the verbs that open run folders: folders or features, and settings of the kind KEY=VALUE."""

from __future__ import annotations

from pathlib import Path

import click

from sae.errors import ConfigError
from sae.files.printable import one_line

_READ_BY_RUN = ("model.", "harvest.cache", "device")
_LONGEST_NUMBER = 18
_READ_BY_EVALUATION = ("evaluation.", *_READ_BY_RUN)


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
