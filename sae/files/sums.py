"""`SHA256SUMS`: the hash of every file in a folder that the toolkit wrote, kept right while a file is replaced.

The list has the format of `sha256sum`, which can check it. While a file is replaced, both its contents are listed, so
that a process killed at any instant leaves a file and a list that agree:

    new content under a temporary name → both hashes listed → renamed → the new hash alone listed

What a user wrote is in no list and is read as it is. Shards of an activation cache have their hashes in its manifest.

A `SHA256SUMS` may be the user's own: it is left alone, and files in that folder have no hash. Whose one is:

- the toolkit's, if it begins with the line that the toolkit begins it with, up to a few damaged bytes;
- else the user's, if every line is one that `sha256sum` writes, or a comment;
- else a damaged one of the toolkit's if files that only the toolkit writes stand beside it; the user's elsewhere.
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

_HEADER = "# Written by sae: 'sae verify' compares the files here with it, and so does 'sha256sum -c SHA256SUMS'.\n"
_LINE = re.compile(r"(# before )?([0-9a-f]{64})  ([^/\0\n]+)")
_OF_SHA256SUM = re.compile(rb"(\\?[0-9a-fA-F]{64} [ *].+|\\?SHA256 \(.+\) = [0-9a-fA-F]{64}|\s*|#.*)\r?")
_BYTES_A_DAMAGED_ONE = 16
"""The first line is the toolkit's if at most one in so many of its bytes is another."""
_BEFORE = "# before "
_MOST_BYTES = 1 << 28
_PATIENCE_SECONDS = 10.0


def recorded(path: Path) -> tuple[str, ...]:
    """Hashes that the file may have by `SHA256SUMS` beside it: one, or two while it is replaced; none if it has none.

    Raises:
        DamagedError: `SHA256SUMS` cannot be read.
    """
    return read_sums(path.parent).get(path.name, ())


def read_sums(folder: Path) -> dict[str, tuple[str, ...]]:
    """Hashes by file name; empty if there is no `SHA256SUMS`, or one of the user's.

    Raises:
        DamagedError: it cannot be read, or is one of the toolkit's and damaged.
    """
    return own_sums(folder) or {}


def own_sums(folder: Path) -> dict[str, tuple[str, ...]] | None:
    """As `read_sums`, but None if the list is the user's."""
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
    if content and (len(first) != len(_HEADER) - 1 or lines[-1:] != [""]):
        raise damaged(path, "damaged (its first or last line is not whole)")
    for number, line in enumerate(lines, 2):
        match = _LINE.fullmatch(line)
        if match is None:
            if line and not line.startswith("#"):
                raise damaged(path, f"damaged (line {number} is no SHA-256 and file name)")
            continue
        _, digest, name = match.groups()
        sums[name] = (*sums.get(name, ()), digest)
    return sums


def is_users(folder: Path) -> bool:
    """Whether there is a `SHA256SUMS` that the toolkit did not write: it records nothing there."""
    path = folder / SUMS
    return os.path.lexists(path) and _is_users(read_whole(path, _MOST_BYTES), folder)


def _is_users(content: bytes, folder: Path) -> bool:
    start = content[: len(_HEADER)]
    wrong = sum(here != there for here, there in zip(start, _HEADER.encode(), strict=False))
    if wrong <= len(start) // _BYTES_A_DAMAGED_ONE:
        return False
    if all(_OF_SHA256SUM.fullmatch(line) for line in content.split(b"\n")):
        return True
    return not any(os.path.lexists(folder / name) for name in WAYS_OUT.keys() - {SUMS, "config.yaml"})


@contextlib.contextmanager
def replacing(path: Path, digest: str) -> Iterator[None]:
    """In the body a file is given new content: until that is done either content is right, then the new one alone.

    Beside a list of the user's nothing is recorded.

    Args:
        path: the file.
        digest: SHA-256 of the new content.

    Raises:
        DamagedError: `SHA256SUMS` cannot be read.
        CacheError: the list cannot hold the file's name; nothing has changed then.
        OSError: it cannot be written; nothing has changed then.
    """
    folder, name = path.parent, path.name
    with _alone(folder):
        sums = own_sums(folder)
        if sums is None:
            yield
            return
        before = _right_now(path, sums.get(name, ()))
        write_sums(folder, {**sums, name: (digest, *before)})
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                write_sums(folder, sums)
            raise
        if before:
            with contextlib.suppress(OSError):  # both may stand until the next time
                write_sums(folder, {**sums, name: (digest,)})


def record(path: Path) -> None:
    """Take the hash of a file as it is into `SHA256SUMS`, unless that is the user's.

    Raises:
        DamagedError: the file or the list cannot be read.
        CacheError: the list cannot hold the file's name.
        OSError: the list cannot be written.
    """
    with _alone(path.parent):
        sums = own_sums(path.parent)
        if sums is not None:
            write_sums(path.parent, {**sums, path.name: (digest_of(path)[0],)})


def forget(path: Path) -> None:
    """Take a file out of `SHA256SUMS`, since it is deleted or will grow.

    Raises:
        DamagedError: the list cannot be read.
        OSError: it cannot be written.
    """
    if not recorded(path):
        return
    with _alone(path.parent):
        sums = own_sums(path.parent)
        if sums is not None:
            sums.pop(path.name, None)
            write_sums(path.parent, sums)


def settle(folder: Path) -> None:
    """After a kill: of two hashes of a file keep the one that it has. The caller is alone in the folder."""
    pending = {name for name, digests in read_sums(folder).items() if len(digests) > 1}
    if not pending:
        return
    with _alone(folder):
        sums = read_sums(folder)
        for name in pending & sums.keys():
            now = _right_now(folder / name, sums[name])
            sums[name] = now or sums[name]
        write_sums(folder, sums)


def _right_now(path: Path, listed: tuple[str, ...]) -> tuple[str, ...]:
    """The hash of what is there, if that is a file which is right or has no hash; else nothing."""
    if not path.is_file():
        return ()
    with contextlib.suppress(DamagedError, UnreadableError):
        digest, _ = digest_of(path)
        return (digest,) if not listed or digest in listed else ()
    return ()


def write_sums(folder: Path, sums: dict[str, tuple[str, ...]]) -> None:
    lines = [_HEADER]
    for name, (digest, *before) in sorted(sums.items()):
        if not _can_be_listed(name):
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


def _can_be_listed(name: str) -> bool:
    """Whether the list with it can be read again."""
    try:
        return b"\n" not in name.encode()
    except UnicodeEncodeError:
        return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time changes a folder's list; where folders cannot be locked, or one hangs, the others go on."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        ends = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > ends:
                    break
                time.sleep(0.005)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
