"""What a command says after Ctrl-C if it does not go on where it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click


@contextlib.contextmanager
def beginning_again(work: str) -> Iterator[None]:
    """While open, Ctrl-C says that this work begins again.

    Raises:
        Abort: Ctrl-C.
    """
    try:
        yield
    except (KeyboardInterrupt, click.Abort) as stopped:
        raise click.Abort(f"interrupted; the same command begins {work} again") from stopped
