"""`SHA256SUMS`: hashes of the files that the toolkit wrote in a folder, kept correct while a file is replaced.

The list has the format of `sha256sum`, which can check it. While a file is replaced, the hashes of both its contents
are listed, so that a process killed at any instant leaves a file and a list that agree:

    new content under a temporary name → both hashes listed → renamed → only the new hash listed

Files that a user wrote are not listed and are read without a check. Shards of an activation cache have their hashes in
its manifest.

A `SHA256SUMS` may be the user's own: it is left alone, and files in that folder have no hash. It is

- the toolkit's, if it begins with the toolkit's first line, up to a few damaged bytes;
- otherwise the user's, if every line is a comment or one that `sha256sum` writes;
- otherwise the toolkit's, damaged, if files that only the toolkit writes are next to it; the user's elsewhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from sae.errors import CacheError, DamagedError, UnreadableError
from sae.files.damage import SUMS, WAYS_OUT, damaged
from sae.files.digest import digest_of, read_whole
from sae.files.temporary import temporary_file

HEADER = "# Written by sae: 'sae verify' compares the files here with it, and so does 'sha256sum -c SHA256SUMS'.\n"
_LINE = re.compile(r"(# before )?(?P<digest>[0-9a-f]{64})  (?P<name>[^/\0\n]+)")
_OF_SHA256SUM = re.compile(rb"(\\?[0-9a-fA-F]{64} [ *].+|\\?SHA256 \(.+\) = [0-9a-fA-F]{64}|\s*|#.*)\r?")
_BYTES_PER_DAMAGED_ONE = 16
"""The first line is the toolkit's if at most one in this many of its bytes differs."""
_BEFORE = "# before "
_MOST_BYTES = 1 << 28
_ATTEMPTS, _SECONDS_BETWEEN_ATTEMPTS = 2000, 0.005


def recorded(path: Path) -> tuple[str, ...]:
    """Accepted hashes of a file in its folder's `SHA256SUMS`: one, two while it is being replaced, or none if unlisted.

    Raises:
        DamagedError: `SHA256SUMS` cannot be read.
    """
    return read_sums(path.parent).get(path.name, ())


def read_sums(folder: Path) -> dict[str, tuple[str, ...]]:
    """Hashes by file name; empty if there is no `SHA256SUMS`, or if it is the user's.

    Raises:
        DamagedError: the list cannot be read, or is the toolkit's and damaged.
    """
    return own_sums(folder) or {}


def own_sums(folder: Path) -> dict[str, tuple[str, ...]] | None:
    """As `read_sums`, except that a list of the user's gives None."""
    path = folder / SUMS
    if not os.path.lexists(path):
        return {}
    sums: dict[str, tuple[str, ...]] = {}
    content = read_whole(path, _MOST_BYTES)
    if _is_users(content, folder):
        return None
    try:
        first, *lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise damaged(path, f"damaged ({error})") from error
    if content and (len(first) != len(HEADER) - 1 or lines[-1:] != [""]):
        raise damaged(path, "damaged (its first or last line is incomplete)")
    for number, line in enumerate(lines, 2):
        if match := _LINE.fullmatch(line):
            sums[match["name"]] = (*sums.get(match["name"], ()), match["digest"])
        elif line and not line.startswith("#"):
            raise damaged(path, f"damaged (line {number} is not a SHA-256 and a file name)")
    return sums


def is_users(folder: Path) -> bool:
    """Whether the folder has a `SHA256SUMS` that the toolkit did not write; it then records nothing there."""
    path = folder / SUMS
    return os.path.lexists(path) and _is_users(read_whole(path, _MOST_BYTES), folder)


def _is_users(content: bytes, folder: Path) -> bool:
    start = content[: len(HEADER)]
    differing = sum(byte != expected for byte, expected in zip(start, HEADER.encode(), strict=False))
    if differing <= len(start) // _BYTES_PER_DAMAGED_ONE:
        return False
    if all(_OF_SHA256SUM.fullmatch(line) for line in content.split(b"\n")):
        return True
    return not any(os.path.lexists(folder / name) for name in WAYS_OUT.keys() - {SUMS, "config.yaml"})


@contextlib.contextmanager
def replacing(path: Path, digest: str) -> Iterator[None]:
    """Context in which a file's content is replaced: both contents are accepted until it ends, then only the new one.

    Nothing is recorded if the list is the user's.

    Args:
        path: the file.
        digest: SHA-256 of the new content.

    Raises:
        DamagedError: `SHA256SUMS` cannot be read.
        CacheError: the list cannot hold the file's name; nothing has changed.
        OSError: the list cannot be written; nothing has changed.
    """
    folder, name = path.parent, path.name
    with _alone(folder) as sums:
        if sums is None:
            yield
            return
        before = _current_hash(path, sums.get(name, ()))
        write_sums(folder, {**sums, name: (digest, *before)})
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                write_sums(folder, sums)
            raise
        if before:
            with contextlib.suppress(OSError):  # both may remain until the next change
                write_sums(folder, {**sums, name: (digest,)})


def record(path: Path) -> None:
    """Record the hash of a file's current content in `SHA256SUMS`, unless that is the user's.

    Raises:
        DamagedError: the file or the list cannot be read.
        CacheError: the list cannot hold the file's name.
        OSError: the list cannot be written.
    """
    with _alone(path.parent) as sums:
        if sums is not None:
            write_sums(path.parent, {**sums, path.name: (digest_of(path)[0],)})


def forget(path: Path) -> None:
    """Remove a file from `SHA256SUMS`, because it is deleted or will grow.

    Raises:
        DamagedError: the list cannot be read.
        OSError: the list cannot be written.
    """
    if not recorded(path):
        return
    with _alone(path.parent) as sums:
        if sums is not None:
            sums.pop(path.name, None)
            write_sums(path.parent, sums)


def settle(folder: Path) -> None:
    """After a kill, keep the correct one of two hashes of a file. No other process may be using the folder."""
    pending = {name for name, digests in read_sums(folder).items() if len(digests) > 1}
    if not pending:
        return
    with _alone(folder) as sums:
        listed = sums or {}
        kept = {name: _current_hash(folder / name, listed[name]) or listed[name] for name in pending & listed.keys()}
        write_sums(folder, listed | kept)


def _current_hash(path: Path, listed: tuple[str, ...]) -> tuple[str, ...]:
    """The hash of a file's current content if it is listed, or if none is; otherwise nothing."""
    if not path.is_file():
        return ()
    with contextlib.suppress(DamagedError, UnreadableError):
        digest, _ = digest_of(path)
        return (digest,) if not listed or digest in listed else ()
    return ()


def write_sums(folder: Path, sums: dict[str, tuple[str, ...]]) -> None:
    lines = [HEADER]
    for name, (digest, *before) in sorted(sums.items()):
        if "\n" in name or name.encode("utf-8", "replace").decode() != name:
            raise CacheError(
                f"{str(folder / name)!r}: {SUMS} cannot list a name with a line end, or one that is not UTF-8; choose "
                "another name"
            )
        lines += [f"{digest}  {name}\n", *(f"{_BEFORE}{other}  {name}\n" for other in before if other != digest)]
    content = "".join(lines).encode()
    with temporary_file(folder / SUMS) as (temporary, descriptor):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(descriptor)
        temporary.replace(folder / SUMS)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[dict[str, tuple[str, ...]] | None]:
    """A folder's list, as `own_sums` gives it, which no other process changes meanwhile.

    If the folder cannot be locked, nobody waits; if the process that holds the lock hangs, others go on after ten
    seconds.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield own_sums(folder)
        return
    try:
        for _ in range(_ATTEMPTS):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS)
            except OSError:
                break
        yield own_sums(folder)
    finally:
        os.close(descriptor)
