"""A .csv or .tsv file in; its rows out, one at a time."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.errors import DataError
from sae.text.limits import most_in_record, there_twice, too_long


def csv_records(
    content: io.TextIOWrapper, path: Path, column: str, delimiter: str, *, reading: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows below the header, with their numbers from 1.

    If the header has the column, it must have it only once; each row must have a field for it, and no more fields than
    the header. A row may end early after the column: some programs leave out empty fields at the end.

    Args:
        content: the text, with its original line ends.
        path: the file, for messages.
        column: the column to read.
        delimiter: separates cells.
        reading: version of how text is read.

    Raises:
        DataError: a row does not fit the header or is too long, the column is repeated, or a quote is not closed.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = _Lines(path, content, most_in_record(reading))
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        if (rows.fieldnames or []).count(column) > 1 and reading >= 4:
            raise DataError(there_twice(f"{path}, line {rows.line_num}", "column", column))
        lines.begin_record()
        for number, row in enumerate(rows, 1):
            if column in row and None in row:
                separator = "tab" if delimiter == "\t" else "comma"
                raise DataError(
                    f"data source {str(path)!r}: line {rows.line_num} has more fields than the header; put text with a "
                    f"{separator} in quotes"
                )
            if column in row and row[column] is None:
                raise DataError(
                    f"data source {str(path)!r}: line {rows.line_num} has fewer fields than the header, and none for "
                    f"{column!r}; put text with a line end in quotes"
                )
            yield number, {key: value for key, value in row.items() if key is not None}
            lines.begin_record()
    except csv.Error as error:
        if lines.ended:
            raise DataError(
                f"data source {str(path)!r}: line {lines.first} is not CSV: a double quote begins a cell, and none "
                "closes it; close it, or double it and put the cell in quotes"
            ) from error
        start = f"; its row begins with line {lines.first}" if lines.last > lines.first else ""
        raise DataError(f"data source {str(path)!r}: line {lines.last} is not CSV ({error}){start}") from error


class _Lines:
    """Lines of a file; those of a record have at most `most` characters together.

    Attributes:
        first, last: numbers of the record's first line, and of the last that was read, from 1.
        ended: whether the file has ended.
    """

    def __init__(self, path: Path, content: io.TextIOWrapper, most: int) -> None:
        self.first, self.ended = 1, False
        self._path, self._content, self._most = path, content, most
        self.last = self._length = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._content.readline(self._most - self._length + 1):
            self._length += len(line)
            self.last += 1
            if self._length > self._most:
                problem = too_long(self._path, f"the record from line {self.first} on", "characters")
                raise DataError(f"{problem}; if it should be shorter, a double quote that begins a cell is not closed")
            yield line
        self.ended = True

    def begin_record(self) -> None:
        """Begin another record with the next line."""
        self.first, self._length = self.last + 1, 0
