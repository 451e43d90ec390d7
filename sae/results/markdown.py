"""Markdown in which names from any source are plain text, to Markdown and to a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sae.files.printable import printable

_MARKUP = re.compile(r"[\\`<\[\]*~@]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""Characters that begin a code span, tag, link, emphasis or entity, or turn an address into a link."""


def code(name: object) -> str:
    """A name as a one-line code span that no character of the name can end."""
    return f"`{printable(str(name)).replace('`', 'ˋ')}`"


def plain(text: object) -> str:
    """A name or a library's message as one line that Markdown shows literally: no code, link, tag or emphasis."""
    return _MARKUP.sub(lambda match: f"\\{match[0]}", printable(str(text)))


def pipe_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 2) -> str:
    """A table whose first columns are aligned left; no content can break out of its cell."""
    rule = [":--" if number < text_columns else "--:" for number in range(len(head))]
    lines = ("| " + " | ".join(map(_cell, cells)) + " |" for cells in (head, rule, *rows))
    return "\n".join(lines)


def document(parts: Iterable[str], between: str = "\n\n") -> str:
    """The parts as one file; remaining control and direction characters become escapes."""
    return printable(between.join(parts), lines=True).rstrip("\n") + "\n"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
