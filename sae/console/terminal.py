"""Standard output and standard error: the only module that prints. Text from files is shown, never interpreted."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.text import Text

from sae.files.printable import printable

_showing: list[Terminal] = []


class Terminal(Console):
    """A console that never interprets text as markup or control sequences, wherever it comes from."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text, lines=True), **{**settings, "markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            if control:
                yield Segment(text, style, control)
            else:
                yield Segment(printable(text, lines=True), style.update_link(None) if style else style)

    def on_broken_pipe(self) -> None:
        """Leave the error to the caller of the command."""
        raise  # noqa: PLE0704  rich calls this while it handles the error


def output() -> Terminal:
    """Standard output."""
    return Terminal()


def errors() -> Terminal:
    """Standard error; the console that is showing progress there, so that a line does not break the display."""
    return _showing[-1] if _showing else Terminal(stderr=True)


@contextlib.contextmanager
def showing(terminal: Terminal) -> Iterator[None]:
    """While open, `errors` returns this terminal."""
    _showing.append(terminal)
    try:
        yield
    finally:
        _showing.remove(terminal)


def say(text: object = "") -> None:
    """Print a line on standard output, however long."""
    output().print(Text(printable(str(text), lines=True)), soft_wrap=True)


def complain(text: str) -> None:
    """Print one line on standard error, however long."""
    line = " ".join(part.strip() for part in text.splitlines())
    errors().print(Text(printable(line)), soft_wrap=True)


def complain_at_length(text: str) -> None:
    """Print several lines on standard error: the usage of a command, or a stack trace."""
    errors().print(Text(printable(text.rstrip(), lines=True)), soft_wrap=True)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """`warnings.showwarning` for users: the message, without the line of source code."""
    complain(f"Warning: {message}")


def prepare() -> None:
    """Write characters that the streams' encoding lacks as escapes instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def unwritable() -> str | None:
    """After an error, the reason that standard output cannot be written; None if it can."""
    try:
        sys.stdout.write("\n")  # if unbuffered, a flush alone would have nothing to write
        sys.stdout.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def close() -> None:
    """Replace a standard output that nobody reads any more, or that cannot be written, with the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
