"""Rows of a file are read as NumPy picks them, in few requests."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.files.scattered import RowFile

START, COUNT = 13, 4000


@pytest.fixture
def content() -> bytes:
    return np.random.default_rng(0).bytes(START + COUNT * 24)


@pytest.fixture
def descriptor(tmp_path: Path, content: bytes) -> Iterator[int]:
    (tmp_path / "rows").write_bytes(content)
    descriptor = os.open(tmp_path / "rows", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def picked(content: bytes, row_bytes: int, rows: np.ndarray) -> np.ndarray:
    end = START + (len(content) - START) // row_bytes * row_bytes
    return np.frombuffer(content[START:end], dtype=f"V{row_bytes}")[rows]


def choices(row_bytes: int) -> list[np.ndarray]:
    rng, count = np.random.default_rng(1), COUNT * 24 // row_bytes
    dense, sparse = rng.random(count) < 0.9, rng.random(count) < 0.01
    return [
        np.arange(0), np.array([0]), np.array([count - 1]), np.arange(count), np.arange(0, count, 2),
        np.flatnonzero(dense), np.flatnonzero(sparse), np.unique([0, count // 2, count - 1]),
    ]  # fmt: skip


@pytest.mark.parametrize("row_bytes", [1, 6, 24, 20_000])
def test_any_rows_are_those_of_the_file(descriptor: int, content: bytes, row_bytes: int) -> None:
    for rows in choices(row_bytes):
        out = np.empty(len(rows), dtype=f"V{row_bytes}")
        RowFile(descriptor, START, row_bytes).read(rows, out)
        assert (out == picked(content, row_bytes, rows)).all()


def test_reads_that_are_cut_short_are_finished(
    descriptor: int, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rng = os.preadv, np.random.default_rng(2)

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        most, few = int(rng.integers(1, 60)), []
        for buffer in buffers:
            few.append(buffer[:most])
            most -= len(few[-1])
        return real(descriptor, few, offset)

    monkeypatch.setattr(os, "preadv", short)
    rows = np.flatnonzero(rng.random(COUNT) < 0.7)
    out = np.empty(len(rows), dtype="V24")
    RowFile(descriptor, START, 24).read(rows, out)
    assert (out == picked(content, 24, rows)).all()


def test_near_rows_are_read_by_one_request(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap of 680 rows of 24 bytes is below 16 KiB, one of 690 above."""
    requests: list[int] = []
    real = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        requests.append(offset)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    rows = np.array([0, 1, 5, 686, 1377, 1378])
    RowFile(descriptor, START, 24).read(rows, np.empty(6, dtype="V24"))
    assert requests == [START, START + 1377 * 24]


def test_a_file_that_ends_early_is_an_error(descriptor: int) -> None:
    end = START + COUNT * 24
    with pytest.raises(EOFError, match=f"it ends at byte {end:,}"):
        RowFile(descriptor, START, 24).read(np.array([COUNT - 1, COUNT]), np.empty(2, dtype="V24"))
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        RowFile(-1, START, 24).read(np.array([0]), np.empty(1, dtype="V24"))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="the system does not say what is in the page cache")
@pytest.mark.parametrize("missing", [None, 0, 800, 3999])
def test_rows_are_cached_if_no_byte_has_to_be_waited_for(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, missing: int | None
) -> None:
    """One of sixteen runs is looked at, the first among them: runs of one row, and one run of all."""

    def preadv(descriptor: int, buffers: Any, offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        if missing is not None and START + missing * 24 <= offset < START + (missing + 1) * 24:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    file = RowFile(descriptor, START, 24)
    assert file.is_cached(np.arange(0, COUNT, 2)) is (missing not in (0, 800))
    assert file.is_cached(np.arange(1601)) is (missing != 800)
    assert file.is_cached(np.arange(0)) is True
    monkeypatch.setattr("sae.files.scattered._NO_WAITING", None)
    assert file.is_cached(np.arange(COUNT)) is False
