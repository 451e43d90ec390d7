"""Tables, for terminals of any width and as Markdown.

In a terminal numbers are never cut: text is narrowed first, then columns are placed below each other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae.files.printable import printable
from sae.results.markdown import pipe_table

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

NONE = "–"
"""The content of a cell without a value."""
BEST, SAME = "*", "≈"
"""Marks for the best cells of a column, and for those that differ from the best only within noise."""
WIDE = 120
"""Width in characters from which a terminal shows every column."""
_READABLE, _LEAST = 20, 10
"""Least width of text as long as numbers can be shortened instead, and in any case."""


@dataclass(frozen=True)
class Column:
    """Cells below a heading.

    Attributes:
        heading: plain text.
        cells: one per row; a cell may have several lines.
        short: used if the terminal is too narrow for `cells`; None: the same cells.
        is_text: aligned left, and may be folded; numbers are aligned right and never folded.
        is_cut: ends with an ellipsis instead of being folded.
        marks: one per row, shown next to the cell; cells marked `BEST` are bold. Empty: no marks.
        is_extra: left out on terminals narrower than `WIDE`.
    """

    heading: str
    cells: Sequence[str | Text]
    short: Sequence[str | Text] | None = None
    is_text: bool = False
    is_cut: bool = False
    marks: Sequence[str] = ()
    is_extra: bool = False

    def width(self, short: bool) -> int:
        """The width of its longest line, in characters."""
        from rich.cells import cell_len

        texts = [self.heading, *map(str, self.shown(short))]
        return max(cell_len(line) for text in texts for line in printable(text, lines=True).split("\n"))

    def shown(self, short: bool) -> Sequence[str | Text]:
        """Its cells in a terminal; values stay aligned whether they are marked or not."""
        cells = self.short if short and self.short is not None else self.cells
        if not any(self.marks):
            return cells
        from rich.text import Text

        return [
            Text(f"{cell} {mark:1}", "bold" if mark == BEST else "")
            for cell, mark in zip(cells, self.marks, strict=True)
        ]

    def in_markdown(self) -> Iterator[str]:
        """Its cells in Markdown, the best in bold."""
        for cell, mark in zip(self.cells, self.marks or [""] * len(self.cells), strict=True):
            yield f"**{cell}**" if mark == BEST else f"{cell} {mark}".strip()


@dataclass(frozen=True)
class Table:
    """Columns under a title.

    Attributes:
        columns: the first one names the rows.
        title: shown above.
        notes: shown below, a sentence or more each; `{best}` becomes the look of the best cells.
        extra_notes: notes on columns that are `is_extra`.
        short_note: shown below if cells were shortened.
        sections: rows with a gap above them in a terminal.
    """

    columns: Sequence[Column]
    title: str = ""
    notes: Sequence[str] = ()
    extra_notes: Sequence[str] = ()
    short_note: str = ""
    sections: Collection[int] = ()

    @staticmethod
    def of_rows(
        head: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", notes: Sequence[str] = ()
    ) -> Table:
        """A table from rows of cells; the first column is text."""
        rows = list(rows)
        columns = [
            Column(heading, [row[number] for row in rows], is_text=not number) for number, heading in enumerate(head)
        ]
        return Table(columns, title, notes)

    def in_terminal(self, width: int | None = None) -> Group:
        """The columns side by side, or several tables below each other that repeat the first column.

        Args:
            width: of the terminal, in characters; None: wide enough.
        """
        from rich.console import Group
        from rich.text import Text

        narrow = width is not None and width < WIDE
        layouts = list(_layouts([column for column in self.columns if not (narrow and column.is_extra)], width))
        notes = [*self.notes, *(() if narrow else self.extra_notes)]
        notes.append(self.short_note if any(layout.short for layout in layouts) else "")
        above = [Text(printable(self.title), style="bold")] if self.title else []
        below = [Text(printable(note.replace("{best}", BEST), lines=True), style="dim") for note in notes if note]
        drawn = [part for layout in layouts for part in (Text(), _drawn(layout, self.sections))][1:]
        return Group(*above, *drawn, *below)

    def in_markdown(self) -> str:
        """The columns as a table, without title and notes."""
        rows = zip(*(column.in_markdown() for column in self.columns), strict=True)
        return pipe_table([column.heading for column in self.columns], rows, text_columns=1)

    def markdown_notes(self) -> list[str]:
        """The notes below the table in Markdown."""
        return [note.replace("{best}", "**bold**") for note in (*self.notes, *self.extra_notes) if note]


@dataclass(frozen=True)
class _Layout:
    """Columns that fit side by side, their widths, and the gap between them."""

    columns: Sequence[Column]
    widths: Sequence[int]
    gap: int
    short: bool


def _layouts(columns: Sequence[Column], width: int | None) -> Iterator[_Layout]:
    """One layout with all columns, full or shortened, or several with as many columns as fit."""
    for gap, short, least in ((2, False, _READABLE), (1, False, _READABLE), (1, True, _READABLE), (1, True, _LEAST)):
        if _fit(columns, width, gap, short, least):
            yield _Layout(columns, _widths(columns, width, gap, short), gap, short)
            return
    key, *rest = columns
    while rest:
        counts = range(len(rest), 1, -1)
        count = next((count for count in counts if _fit([key, *rest[:count]], width, 1, True, _LEAST)), 1)
        part, rest = [key, *rest[:count]], rest[count:]
        yield _Layout(part, _widths(part, width, 1, True), 1, True)


def _fit(columns: Sequence[Column], width: int | None, gap: int, short: bool, least: int) -> bool:
    """Whether columns fit side by side, with numbers at full width and every text at least `least` wide."""
    needed = (min(column.width(short), least) if column.is_text else column.width(short) for column in columns)
    return width is None or sum(needed) + gap * (len(columns) - 1) <= width


def _widths(columns: Sequence[Column], width: int | None, gap: int, short: bool) -> list[int]:
    """Numbers at full width, text in what remains, but never narrower than a character."""
    widths = [column.width(short) for column in columns]
    if width is None:
        return widths
    texts = sorted((number for number, column in enumerate(columns) if column.is_text), key=widths.__getitem__)
    left = width - gap * (len(columns) - 1) - sum(widths) + sum(widths[number] for number in texts)
    for place, number in enumerate(texts):  # the shortest first: the others get what it does not need
        widths[number] = min(widths[number], max(1, left // (len(texts) - place)))
        left -= widths[number]
    return widths


def _drawn(layout: _Layout, sections: Collection[int]) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
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
        table.add_row(*map(_cell, cells, layout.columns, layout.widths))
    return table


def _cell(cell: str | Text, column: Column, width: int) -> Text:
    """A cell as text, with line breaks in words that are too wide: after underscores if there are any."""
    from rich.text import Text

    if isinstance(cell, Text):
        return cell
    text = printable(cell, lines=True)
    if column.is_text and not column.is_cut:
        line = rf"\S{{1,{width}}}$|\S{{0,{width - 1}}}_|\S{{{width}}}"
        text = re.sub(rf"\S{{{width + 1},}}", lambda word: "\n".join(re.findall(line, word[0])), text)
    return Text(text)
