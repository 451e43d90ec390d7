"""Rows from many places of a file, read together in few requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from jaxtyping import Int, Shaped

_BRIDGED_BYTES = 1 << 14
"""Gaps up to this size are read too, and dropped: another request would cost more."""
_DROPPED = memoryview(bytearray(_BRIDGED_BYTES))
_MOST_PIECES = 1000
"""Pieces of memory that one request fills; systems allow 1024."""
_SAMPLED = 16
"""One of so many runs is looked at to find out whether all are in the page cache."""
_NO_WAITING = getattr(os, "RWF_NOWAIT", None)
_BYTE = bytearray(1)


@dataclass(frozen=True)
class RowFile:
    """An open file that holds rows of bytes.

    Attributes:
        descriptor: the open file.
        start: byte at which row 0 begins.
        row_bytes: size of a row.
    """

    descriptor: int
    start: int
    row_bytes: int

    def read(self, rows: Int[np.ndarray, " rows"], out: Shaped[np.ndarray, " rows"]) -> None:
        """Read rows into memory, one after the other.

        Args:
            rows: their numbers, ascending.
            out: contiguous items of `row_bytes` bytes.

        Raises:
            OSError: the system cannot read the file.
            EOFError: the file ends before the last row.
        """
        memory = out.view(np.uint8).data
        pieces: list[memoryview] = []
        begin = end = 0
        for first, stop, row in _runs(rows):
            offset = row * self.row_bytes
            gap = offset - end
            if pieces and (gap > _BRIDGED_BYTES or len(pieces) > _MOST_PIECES):
                _fill(self.descriptor, pieces, self.start + begin)
                pieces = []
            if not pieces:
                begin = offset
            elif gap:
                pieces.append(_DROPPED[:gap])
            pieces.append(memory[first * self.row_bytes : stop * self.row_bytes])
            end = offset + (stop - first) * self.row_bytes
        if pieces:
            _fill(self.descriptor, pieces, self.start + begin)

    def is_cached(self, rows: Int[np.ndarray, " rows"]) -> bool:
        """Whether rows are in the page cache, as far as a sample tells; False if the system does not say.

        Args:
            rows: numbers of rows, ascending.
        """
        if _NO_WAITING is None:
            return False
        try:
            for first, stop, row in islice(_runs(rows), 0, None, _SAMPLED):
                middle = row * self.row_bytes + (stop - first) * self.row_bytes // 2  # the ends share neighbours' pages
                os.preadv(self.descriptor, [_BYTE], self.start + middle, _NO_WAITING)
        except OSError:
            return False
        return True


def _runs(rows: Int[np.ndarray, " rows"]) -> Iterator[tuple[int, int, int]]:
    """Ranges of `rows` whose numbers follow each other, and the first of the numbers."""
    if len(rows):
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        bounds = [0, *breaks.tolist(), len(rows)]
        for (first, stop), row in zip(pairwise(bounds), rows[bounds[:-1]].tolist(), strict=True):
            yield first, stop, row


def _fill(descriptor: int, pieces: list[memoryview], offset: int) -> None:
    """Fill pieces of memory with what follows in a file."""
    left = sum(map(len, pieces))
    while (count := os.preadv(descriptor, pieces, offset)) < left:
        if count == 0:
            raise EOFError(f"it ends at byte {offset:,}")
        left, offset = left - count, offset + count
        while count >= len(pieces[0]):
            count -= len(pieces.pop(0))
        pieces[0] = pieces[0][count:]
