"""Rows of a file, read by the system straight to their places in memory."""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
from jaxtyping import Int

_MOST_PIECES = 1024
"""`IOV_MAX` of Linux and macOS."""
_BRIDGED = 1 << 14
"""Gaps up to this size are read too, and dropped: another read would cost more."""
_DROPPED = np.empty(_BRIDGED, dtype=np.uint8)
_PIECE_BYTES = 2 * np.dtype(np.intp).itemsize

_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.restype = ctypes.c_ssize_t
_preadv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)


def read_rows(
    descriptor: int, start: int, row_bytes: int, rows: Int[np.ndarray, " rows"], addresses: Int[np.ndarray, " rows"]
) -> None:
    """Copy rows of a file to memory, without a copy in between.

    Rows that follow each other in the file are read by one call, which puts each in its place. Other threads run
    meanwhile.

    Args:
        descriptor: the open file.
        start: byte at which row 0 begins.
        row_bytes: size of a row.
        rows: numbers of the rows, ascending.
        addresses: where each goes: addresses of memory that the caller owns and keeps.

    Raises:
        OSError: the system cannot read the file.
        EOFError: the file ends before the last row.
    """
    if len(rows) == 0:
        return
    pieces, offsets = _pieces(start, row_bytes, rows, addresses)
    begins = _begins_of_reads(pieces, offsets)
    ends = [*begins[1:].tolist(), len(pieces)]
    sums = np.add.reduceat(pieces[:, 1], begins).tolist()
    first = pieces.ctypes.data
    for begin, end, size, offset in zip(begins.tolist(), ends, sums, offsets[begins].tolist(), strict=True):
        count = _preadv(descriptor, first + begin * _PIECE_BYTES, end - begin, offset)
        if count != size:
            _finish(descriptor, pieces[begin:end], offset, count)


def _pieces(
    start: int, row_bytes: int, rows: Int[np.ndarray, " rows"], addresses: Int[np.ndarray, " rows"]
) -> tuple[Int[np.ndarray, "pieces 2"], Int[np.ndarray, " pieces"]]:
    """Address and length of each piece of memory, and the place of its content in the file."""
    joined = (np.diff(rows) == 1) & (np.diff(addresses) == row_bytes)
    firsts = np.flatnonzero(np.concatenate(([True], ~joined)))
    offsets = start + rows[firsts] * row_bytes
    pieces = np.stack([addresses[firsts], np.diff(firsts, append=len(rows)) * row_bytes], axis=1)
    ends = offsets + pieces[:, 1]
    gaps = offsets[1:] - ends[:-1]
    bridged = np.flatnonzero((gaps > 0) & (gaps <= _BRIDGED))
    if len(bridged):
        dropped = np.stack([np.full(len(bridged), _DROPPED.ctypes.data), gaps[bridged]], axis=1)
        pieces = np.insert(pieces, bridged + 1, dropped, axis=0)
        offsets = np.insert(offsets, bridged + 1, ends[bridged])
    return np.ascontiguousarray(pieces, dtype=np.intp), offsets


def _begins_of_reads(
    pieces: Int[np.ndarray, "pieces 2"], offsets: Int[np.ndarray, " pieces"]
) -> Int[np.ndarray, " reads"]:
    """The first piece of each read: its pieces follow each other in the file, and are not too many."""
    apart = offsets[1:] != (offsets + pieces[:, 1])[:-1]
    runs = np.flatnonzero(np.concatenate(([True], apart)))
    number = np.arange(len(pieces))
    in_run = number - np.repeat(runs, np.diff(runs, append=len(pieces)))
    return np.flatnonzero(in_run % _MOST_PIECES == 0)


def _finish(descriptor: int, pieces: Int[np.ndarray, "pieces 2"], offset: int, count: int) -> None:
    """Go on with a read that failed or gave less than it was asked for."""
    while True:
        if count < 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        elif count == 0:
            raise EOFError(f"it ends at byte {offset:,}")
        else:
            offset += count
            ends = pieces[:, 1].cumsum()
            done = int(np.searchsorted(ends, count, side="right"))
            if done == len(pieces):
                return
            pieces = pieces[done:].copy()
            left = int(ends[done]) - count
            pieces[0] += (pieces[0, 1] - left, left - pieces[0, 1])
        count = _preadv(descriptor, pieces.ctypes.data, len(pieces), offset)
