"""Tables for terminals of any width: numbers are never cut, text gives way first, then columns go below each other."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae.files.printable import printable

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

_READABLE, _LEAST = 20, 10
"""Characters that text keeps as long as numbers can be shortened instead, and those that it always keeps."""


@dataclass(frozen=True)
class Column:
    """Cells below a heading.

    Attributes:
        heading: as text.
        cells: one a row; a cell may have several lines.
        short: what stands there if the terminal is too narrow for `cells`; None: the same.
        is_text: may be folded, and stands on the left; numbers stand on the right and stay whole.
        is_cut: ends with an ellipsis rather than go on in another line.
    """

    heading: str
    cells: Sequence[str | Text]
    short: Sequence[str | Text] | None = None
    is_text: bool = False
    is_cut: bool = False

    def width(self, short: bool) -> int:
        """Characters of its longest line."""
        from rich.cells import cell_len

        texts = [self.heading, *map(str, self.shown(short))]
        return max(cell_len(line) for text in texts for line in printable(text, lines=True).split("\n"))

    def shown(self, short: bool) -> Sequence[str | Text]:
        """Its cells."""
        return self.short if short and self.short is not None else self.cells


@dataclass(frozen=True)
class _Layout:
    """Columns that fit beside each other, how wide they are, and how far apart."""

    columns: Sequence[Column]
    widths: Sequence[int]
    gap: int
    short: bool


def fitted(
    columns: Sequence[Column], width: int | None = None, *, title: str = "", note: str = "", short_note: str = "",
    sections: Collection[int] = (),
) -> Group:  # fmt: skip
    """The columns as a table, or as several below each other that repeat the first column.

    Args:
        columns: the first one names the rows.
        width: characters of the terminal; None: it is wide enough.
        title: above.
        note: below; several lines, if need be.
        short_note: below it if cells were shortened.
        sections: rows that a gap stands before.
    """
    from rich.console import Group
    from rich.text import Text

    layouts = list(_layouts(columns, width))
    notes = [note, short_note if any(layout.short for layout in layouts) else ""]
    above = [Text(printable(title), style="bold")] if title else []
    below = [Text(printable(text, lines=True), style="dim") for text in notes if text]
    drawn = [part for layout in layouts for part in (Text(), _drawn(layout, sections))][1:]
    return Group(*above, *drawn, *below)


def _layouts(columns: Sequence[Column], width: int | None) -> Iterator[_Layout]:
    """One with everything, as it is or shortened, or several of as many columns as fit."""
    for gap, short, least in ((2, False, _READABLE), (1, False, _READABLE), (1, True, _READABLE), (1, True, _LEAST)):
        widths = _widths(columns, width, gap, short, least)
        if widths is not None:
            yield _Layout(columns, widths, gap, short)
            return
    key, rest = columns[0], list(columns[1:])
    while rest:
        count = len(rest)
        while count > 1 and _widths([key, *rest[:count]], width, 1, True, _LEAST) is None:
            count -= 1
        part, rest = [key, *rest[:count]], rest[count:]
        yield _Layout(part, _widths(part, width, 1, True, _LEAST) or _squeezed(part, width), 1, True)


def _widths(columns: Sequence[Column], width: int | None, gap: int, short: bool, least: int) -> list[int] | None:
    """Numbers as wide as they are, text as wide as is left, and not below `least`; None if that is too wide."""
    natural = [column.width(short) for column in columns]
    if width is None:
        return natural
    left = width - gap * (len(columns) - 1) - sum(
        own for column, own in zip(columns, natural, strict=True) if not column.is_text
    )  # fmt: skip
    texts = sorted((own, number) for number, (column, own) in enumerate(zip(columns, natural, strict=True))
                   if column.is_text)  # fmt: skip
    given = dict(enumerate(natural))
    for place, (own, number) in enumerate(texts):  # the shortest first: what it does not need is the others'
        given[number] = min(own, left // (len(texts) - place))
        if given[number] < min(own, least):
            return None
        left -= given[number]
    return list(given.values()) if left >= 0 else None


def _squeezed(columns: Sequence[Column], width: int | None) -> list[int]:
    """One number beside its name, however narrow the terminal."""
    natural = [column.width(True) for column in columns]
    return [max(1, (width or sum(natural)) - sum(natural[1:]) - len(columns) + 1), *natural[1:]]


def _drawn(layout: _Layout, sections: Collection[int]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, layout.gap - 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold"
    )
    last = len(layout.columns) - 1
    for number, (column, width) in enumerate(zip(layout.columns, layout.widths, strict=True)):
        table.add_column(
            Text(printable(column.heading, lines=True)),
            justify="left" if column.is_text else "right",
            width=None if column.is_text and number == last else width,
            max_width=width,
            no_wrap=not column.is_text or column.is_cut,
            overflow="ellipsis" if column.is_cut else "fold",
        )
    for row, cells in enumerate(zip(*(column.shown(layout.short) for column in layout.columns), strict=True)):
        if row in sections:
            table.add_section()
        table.add_row(
            *(
                Text(_broken(printable(cell, lines=True), width if column.is_text and not column.is_cut else None))
                if isinstance(cell, str)
                else cell
                for cell, column, width in zip(cells, layout.columns, layout.widths, strict=True)
            )
        )
    return table


def _broken(text: str, width: int | None) -> str:
    """The text with line ends in words that are wider, behind underscores as far as there are some."""
    if width is None:
        return text

    def broken(word: re.Match[str]) -> str:
        lines = [""]
        for part in re.findall(rf"[^_]{{0,{width - 1}}}_|[^_]{{1,{width}}}", word[0]):
            lines = [*lines[:-1], lines[-1] + part] if len(lines[-1] + part) <= width else [*lines, part]
        return "\n".join(filter(None, lines))

    return re.sub(rf"\S{{{width + 1},}}", broken, text)
