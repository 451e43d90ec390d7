"""Arguments of the verbs that evaluate: folders, and settings of the kind KEY=VALUE."""

from __future__ import annotations

from pathlib import Path

from sae.errors import ConfigError

_READ_BY_EVALUATION = ("evaluation.", "model.", "harvest.cache", "device")


def evaluation_overrides(arguments: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The overrides, and the rest, among arguments.

    Raises:
        ConfigError: an override that evaluation does not read.
    """
    overrides = tuple(argument for argument in arguments if "=" in argument and not Path(argument).exists())
    for override in overrides:
        if not override.startswith(_READ_BY_EVALUATION):
            key = override.partition("=")[0]
            raise ConfigError(
                f"override {override!r}: evaluation does not read {key}; it reads {', '.join(_READ_BY_EVALUATION)}: "
                "train another run to change what was trained"
            )
    return overrides, [argument for argument in arguments if argument not in overrides]
