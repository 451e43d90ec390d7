"""Commands whose help lists the settings that they read as KEY=VALUE."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click

_LONGEST = 80

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
                formatter.write_dl([(f"{key}={default}"[:_LONGEST], text) for key, default, text in keys()], col_max=34)

    return Command
