"""Rows from many places of a file: read together in few requests, or into memory that the file is mapped to."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Callable, Iterator
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
_POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ, since 5.14: read pages and map them. Python has no name for it."""
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

    def announce(self, rows: Int[np.ndarray, " rows"]) -> None:
        """Have the system begin to read rows, where it can: all requests are at the disk together.

        Args:
            rows: their numbers, ascending.
        """
        if hasattr(os, "posix_fadvise"):
            for first, stop, row in _runs(rows):
                begin, size = self.start + row * self.row_bytes, (stop - first) * self.row_bytes
                os.posix_fadvise(self.descriptor, begin, size, os.POSIX_FADV_WILLNEED)

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


def populate(address: int, rows: Int[np.ndarray, " rows"], row_bytes: int) -> bool:
    """Have the system read rows of a mapped file and map them, so that nobody waits for them later.

    Args:
        address: where row 0 is mapped.
        rows: their numbers, ascending.
        row_bytes: size of a row.

    Returns:
        False if the system cannot do so, or not with all of these rows.
    """
    madvise = _madvise()
    if madvise is None:
        return False
    for first, stop, row in _runs(rows):
        begin, end = address + row * row_bytes, address + (row + stop - first) * row_bytes
        begin -= begin % mmap.PAGESIZE
        if madvise(begin, end - begin, _POPULATE_READ):
            return False
    return True


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's function, if it is Linux's; it gives other threads the interpreter."""
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


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
