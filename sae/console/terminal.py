"""Standard output and standard error: the only place that prints. What comes out of files is shown, never obeyed."""

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
    """A console whose text is neither markup nor control sequences, wherever it comes from."""

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
        """Leave it to the caller of the command."""
        raise  # noqa: PLE0704  rich calls this while it handles the error


def output() -> Terminal:
    """Standard output."""
    return Terminal()


def errors() -> Terminal:
    """Standard error; what shows progress there at the moment, so that a line does not break into it."""
    return _showing[-1] if _showing else Terminal(stderr=True)


@contextlib.contextmanager
def showing(terminal: Terminal) -> Iterator[None]:
    """While open, `errors` is this one."""
    _showing.append(terminal)
    try:
        yield
    finally:
        _showing.remove(terminal)


def say(text: object = "") -> None:
    """A line on standard output, however long."""
    output().print(Text(printable(str(text), lines=True)), soft_wrap=True)


def complain(text: str) -> None:
    """One line on standard error, however long."""
    line = " ".join(part.strip() for part in text.splitlines())
    errors().print(Text(printable(line)), soft_wrap=True)


def complain_at_length(text: str) -> None:
    """Several lines on standard error: how a command is used, or a stack trace."""
    errors().print(Text(printable(text.rstrip(), lines=True)), soft_wrap=True)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """`warnings.showwarning` for people: what is wrong, without the line of the source."""
    complain(f"Warning: {message}")


def prepare() -> None:
    """Let characters that the streams' encoding lacks become escapes instead of errors."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def unwritable() -> str | None:
    """After an error: why standard output takes no line end; None if it does."""
    try:
        sys.stdout.write("\n")  # unbuffered, it has nothing left that a flush would meet
        sys.stdout.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def close() -> None:
    """Take leave of a standard output that nobody reads any more, or that takes nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
