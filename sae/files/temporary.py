"""Temporary files, which hold content until it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from sae.errors import DamagedError, UnreadableError
from sae.files.damage import SUMS
from sae.files.digest import open_regular


def is_leftover(name: str) -> bool:
    """Whether a file is one of the toolkit's book-keeping files, or a temporary file left by a killed process."""
    return name in (".lock", SUMS) or (name.startswith(".") and name.endswith(".tmp"))


def clear_temporaries(folder: Path) -> None:
    """Delete temporary files of killed processes; those of running processes are locked and stay."""
    for path in folder.glob(".*-*.tmp"):
        with contextlib.suppress(OSError, DamagedError, UnreadableError), os.fdopen(open_regular(path), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file next to `path`, with a unique name, and its descriptor; deleted at the end if it still exists.

    It is locked while it is open, so that `clear_temporaries` can tell it from one that a killed process left.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.lexists(temporary):
            break
        os.close(descriptor)
    try:
        yield temporary, descriptor
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        os.close(descriptor)
