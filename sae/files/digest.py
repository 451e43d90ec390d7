"""The SHA-256 of a file, computed once per process, and safe against FIFOs and devices in the file's place."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import time
from pathlib import Path

from sae.files.damage import damaged, unreadable

_PIECE, _MAPPED = 1 << 17, 1 << 22
_POPULATE_READ = 22
Identity = tuple[int, ...]
"""Device, inode, size, and the times of the last change of a file: the same until somebody writes it."""
TIMES_READ = 3
_YOUNG_NS = 100_000_000
"""A file that changed more recently than this may change again and keep its times."""
_KNOWN: dict[Identity, str] = {}
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def open_regular(path: Path, remedy: str | None = None) -> int:
    """Open a file for reading and return its descriptor; never waits, even for a FIFO.

    Raises:
        DamagedError: the file is missing or not a regular file.
        UnreadableError: the machine cannot open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, remedy) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise damaged(path, f"{kind} where a file should be", remedy)
    return descriptor


def identity_of(state: os.stat_result) -> Identity:
    """The `Identity` of a file."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, which is read at most once per process, unless it changes.

    Raises:
        DamagedError: the file is missing or not a regular file.
    """
    return digest_of(path)[0]


def digest_of(path: Path, remedy: str | None = None) -> tuple[str, Identity]:
    """SHA-256 of a file's content, and the file's identity while it was read."""
    for _ in range(TIMES_READ):
        with os.fdopen(open_regular(path, remedy), "rb", buffering=0) as file:
            identity = identity_of(os.fstat(file.fileno()))
            if identity in _KNOWN:
                return _KNOWN[identity], identity
            try:
                digest = _hash_mapped(file.fileno(), identity[2]) or _hash_read(file.fileno())
            except (OSError, ValueError) as error:
                raise unreadable(path, error, remedy) from error
            if identity_of(os.fstat(file.fileno())) == identity:
                if time.time_ns() - identity[-1] > _YOUNG_NS:
                    _KNOWN[identity] = digest
                return digest, identity
    raise damaged(path, "changes while it is read; wait for the process that writes it", remedy)


def _hash_read(descriptor: int) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    while count := os.readv(descriptor, [piece]):
        digest.update(piece[:count])
    return digest.hexdigest()


def _hash_mapped(descriptor: int, size: int) -> str | None:
    """As `_hash_read`, without the copy, which takes a seventh of the time; None if the system does not support it.

    Each piece is loaded into memory first, so that an unreadable one is an error, not a signal that ends the process.
    """
    digest = hashlib.sha256()
    for start in range(0, size, _MAPPED):
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, start, 3 * _MAPPED, os.POSIX_FADV_WILLNEED)
        with mmap.mmap(descriptor, min(_MAPPED, size - start), access=mmap.ACCESS_READ, offset=start) as piece:
            try:
                piece.madvise(_POPULATE_READ)
            except OSError as error:
                if start == 0 and error.errno == errno.EINVAL:  # before Linux 5.14
                    return None
                raise
            digest.update(piece)
    return digest.hexdigest()


def read_whole(path: Path, most: int, remedy: str | None = None) -> bytes:
    with os.fdopen(open_regular(path, remedy), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise damaged(path, f"{size:,} bytes, where at most {most:,} are read", remedy)
        try:
            return file.read(most + 1)
        except OSError as error:
            raise unreadable(path, error, remedy) from error
