"""Comparison of a file that the toolkit wrote with its SHA-256 in the folder's `SHA256SUMS`, before it is used."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sae.files.damage import NUMBERED, PARTS, SUMS, damaged
from sae.files.digest import TIMES_READ, Identity, digest_of, identity_of, open_regular, read_whole
from sae.files.sums import is_users, recorded

Read = TypeVar("Read")


class UnhashedWarning(UserWarning):
    """A file that the toolkit wrote has no recorded hash."""


class MissingWarning(UserWarning):
    """A file that the toolkit wrote is missing, and the result is computed without it."""


def check(
    path: Path, expected: str | None = None, *, remedy: str | None = None, announce: bool = True
) -> Identity:  # fmt: skip
    """Compare a file with its hash; the file is read at most once per process, unless it changes.

    Args:
        path: the file.
        expected: its hash, if that is not in `SHA256SUMS`.
        remedy: what to do if it is damaged; by default depends on its name.
        announce: warn if it has no hash.

    Returns:
        Identity of the file when it was read, with which later readers can check that it is still the same.

    Raises:
        DamagedError: the file is missing, not a regular file, or differs from its hash.
        UnreadableError: the machine cannot read it.
    """

    def read(hashed: bool) -> tuple[str, Identity]:
        if hashed:
            return digest_of(path, remedy)
        with os.fdopen(open_regular(path, remedy), "rb") as file:
            return "", identity_of(os.fstat(file.fileno()))

    return _accepted(path, expected, read, remedy, announce)


def read_checked(
    path: Path, expected: str | None = None, *, most: int, remedy: str | None = None, announce: bool = True
) -> bytes:
    """Read a file that fits into memory, and compare the content with its hash.

    Args:
        path: the file.
        expected: its hash, if that is not in `SHA256SUMS`.
        most: maximum size in bytes; a larger file is refused.
        remedy: what to do if it is damaged; by default depends on its name.
        announce: warn if it has no hash.

    Raises:
        DamagedError: as `check`; or the file is too large.
    """

    def read(hashed: bool) -> tuple[str, bytes]:
        content = read_whole(path, most, remedy)
        return hashlib.sha256(content).hexdigest() if hashed else "", content

    return _accepted(path, expected, read, remedy, announce)


def _accepted(
    path: Path, expected: str | None, read: Callable[[bool], tuple[str, Read]], remedy: str | None, announce: bool
) -> Read:
    """The result of reading a file whose hash is the expected one, or that has none.

    Args:
        path: the file.
        expected: its hash, if that is not in `SHA256SUMS`.
        read: reads the file, and returns its hash if the argument is true, and the result.
        remedy: what to do if it is damaged.
        announce: warn if it has no hash.
    """
    digest, accepted = "", tuple[str, ...]()
    for _ in range(TIMES_READ):  # another process may replace it meanwhile
        accepted = recorded(path) if expected is None else (expected,)
        digest, result = read(bool(accepted))
        if announce and not accepted:
            announce_unhashed(path)
        if not accepted or digest in accepted:
            return result
    raise damaged(
        path, f"damaged or changed: its SHA-256 is {digest[:12]}… and should be {accepted[0][:12]}…", remedy
    )  # fmt: skip


def announce_unhashed(path: Path) -> None:
    """Warn that a file has no hash: once per run folder, or per other folder including its subfolders."""
    path = path.absolute()
    folder = _run_of(path.parent) or path.parent
    if any(place in _ANNOUNCED for place in (folder, *folder.parents)):
        return
    _ANNOUNCED.add(folder)
    reason, advice = "as in folders written before there was one", ""
    if is_users(path.parent):
        reason, advice = "which sae did not write", f"rename that {SUMS}, and "
    warnings.warn(
        f"{str(folder)!r}: {path.relative_to(folder)} has no SHA-256 in {SUMS}, {reason}: it is read, but damage "
        f"would go unnoticed; {advice}'sae verify --record' on the folder adds hashes",
        UnhashedWarning,
        stacklevel=5,
    )


def announce_missing(path: Path, without: str) -> None:
    """Warn if a missing file is listed in `SHA256SUMS`; a file that was never written is not.

    Args:
        path: the file.
        without: consequence of its absence.

    Raises:
        DamagedError: `SHA256SUMS` cannot be read.
    """
    if recorded(path):
        warnings.warn(f"{str(path)!r}: missing, though {SUMS} lists it; {without}", MissingWarning, stacklevel=3)


def _run_of(folder: Path) -> Path | None:
    """The run folder that a folder is part of, by its name; None if there is none."""
    part = folder.parent if folder.parent.name in NUMBERED else folder
    run = part.parent
    return run if part.name in PARTS and os.path.lexists(run / "config.yaml") else None


_ANNOUNCED: set[Path] = set()
