"""Atomic writing of files: under a temporary name, then synced, hashed and renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.errors import CacheError
from sae.files.damage import MORE_FILES, SUMS
from sae.files.paths import expanded
from sae.files.printable import json_text
from sae.files.sums import forget, replacing, settle
from sae.files.temporary import clear_temporaries, temporary_file

if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: Path, content: bytes, *, hashed: bool = True) -> str:
    """Write a file atomically: a crash at any instant leaves either the old content or the new.

    Args:
        path: the file; its folder is created if it is missing.
        content: the whole content.
        hashed: record the hash in `SHA256SUMS` next to the file.

    Returns:
        SHA-256 of the content.

    Raises:
        CacheError: the folder cannot be written, or the disk is full; the old file is untouched.
    """
    return write_chunks(path, [content], hashed=hashed)


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview], *, hashed: bool = True) -> str:
    """As `write_bytes`, for content that comes in pieces and need not fit into memory.

    Raises:
        CacheError: the folder cannot be written, or the disk is full; the old file is untouched.
    """
    digest, written = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_once(path.parent, os.getpid())
        with temporary_file(path) as (temporary, descriptor):
            with open(descriptor, "wb", closefd=False) as file:
                for chunk in chunks:
                    written += len(chunk)
                    file.write(chunk)
                    digest.update(chunk)
            os.fsync(descriptor)
            if not hashed:
                forget(path)
            with replacing(path, digest.hexdigest()) if hashed else contextlib.nullcontext():
                temporary.replace(path)
                _sync_folder(path.parent)
    except OSError as error:
        raise CacheError(_explain(path, written, error)) from error
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, atomically."""
    write_bytes(path, json_content(content))


def json_content(content: Any) -> bytes:
    """The content of a JSON file."""
    return (json_text(content, indent=2) + "\n").encode()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file atomically.

    Returns:
        Its SHA-256.
    """
    return write_bytes(path, tensors_content(tensors))


def tensors_content(tensors: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file; the same tensors give the same bytes."""
    from safetensors.torch import save  # imported here because it takes seconds, which would delay the command line

    return save(dict(tensors))


def delete(path: Path) -> None:
    """Delete a file, if it exists, and its hash.

    Raises:
        CacheError: the folder cannot be written.
    """
    try:
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            forget(path)
    except OSError as error:
        raise CacheError(_explain(path, 0, error)) from error


def stands(path: Path) -> bool:
    """Whether anything has this name, even if it is not a file, which is an error for its reader."""
    return os.path.lexists(path)


@functools.cache
def _clear_once(folder: Path, process: int) -> None:
    """Clear a folder, once per process."""
    clear_temporaries(folder)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def missing_space(needs: Mapping[Path, int]) -> str | None:
    """A sentence on the space that folders need and their disk lacks; None if all fits. Folders on one disk share it.

    Args:
        needs: bytes still to write, by folder.
    """
    disks: dict[int, list[Path]] = {}
    for folder in needs:
        disks.setdefault(_existing(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        needed, free = sum(needs[folder] for folder in folders), free_bytes(folders[0])
        if needed > free:
            more = f" and {len(folders) - 1} more on the same disk" if len(folders) > 1 else ""
            return f"{str(folders[0])!r}{more} need {needed / 1e9:,.2f} GB more, {free / 1e9:,.2f} GB are free"
    return None


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    place = expanded(folder).resolve()
    return next(path for path in (place, *place.parents) if path.exists())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(path: Path, size: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"disk full: {str(path)!r} needs {size:,} bytes or more; nothing is damaged: "
            "free some space and run the same command again to continue"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"cannot write {str(path)!r}: {error.strerror}; {MORE_FILES}"
    if error.errno == errno.ENAMETOOLONG:
        return f"cannot write {str(path)!r}: {error.strerror}; choose a shorter name"
    return f"cannot write {str(path)!r}: {error.strerror or error}; choose another folder or change its permissions"


_LOCKED: set[tuple[int, int, Path]] = set()
"""Folders that are locked, by process and thread."""


@contextlib.contextmanager
def locked(folder: Path, doing: str) -> Iterator[None]:
    """Let only one process, and one thread of it, into a folder; the lock is released however the process ends.

    A thread that holds the lock may lock the folder again. Leftovers of killed processes are cleaned up first.

    Args:
        folder: created if it is missing.
        doing: the process's task, for the error in a second process.

    Raises:
        CacheError: the folder cannot be written, or another process holds it.
    """
    path, holder = folder / ".lock", (os.getpid(), threading.get_ident(), expanded(folder).resolve())
    if holder in _LOCKED:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CacheError(_explain(folder, 0, error)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CacheError(f"{str(path)!r} is not a regular file; delete it")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CacheError(
                f"folder {str(folder)!r}: another {doing} is writing it; wait for it or stop it"
            ) from error
        try:
            clear_temporaries(folder)
            settle(folder)
        except OSError as error:
            raise CacheError(_explain(folder / SUMS, 0, error)) from error
        _LOCKED.add(holder)
        yield
    finally:
        _LOCKED.discard(holder)
        os.close(descriptor)
