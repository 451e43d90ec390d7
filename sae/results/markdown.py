"""Markdown whose names, wherever they come from, are shown and not obeyed, by a terminal or by Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sae.files.printable import printable

_MARKUP = re.compile(r"[\\`<\[\]*~@]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""What begins a code span, tag, link, emphasis or entity, or makes an address a link by itself."""


def code(name: object) -> str:
    """A name as a code span of one line, which no character of the name ends."""
    return f"`{printable(str(name)).replace('`', 'ˋ')}`"


def plain(text: object) -> str:
    """A name, or a library's words, as one line that Markdown shows as it is: no code, link, tag or emphasis."""
    return _MARKUP.sub(lambda match: f"\\{match[0]}", printable(str(text)))


def pipe_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 2) -> str:
    """A table, the first columns to the left; what a cell holds stays in it."""
    rule = [":--" if number < text_columns else "--:" for number in range(len(head))]
    lines = ("| " + " | ".join(map(_cell, cells)) + " |" for cells in (head, rule, *rows))
    return "\n".join(lines)


def document(parts: Iterable[str], between: str = "\n\n") -> str:
    """The parts as one file; control and direction characters that are left in them become escapes."""
    return printable(between.join(parts), lines=True).rstrip("\n") + "\n"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")
