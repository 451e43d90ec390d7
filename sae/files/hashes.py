"""SHA-256 of every file that the toolkit wrote, in `SHA256SUMS` beside it; a file is compared with it before use.

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
import errno
import fcntl
import hashlib
import mmap
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from sae.errors import CacheError, DamagedError, UnreadableError

SUMS = "SHA256SUMS"
_PIECE, _MAPPED = 1 << 17, 1 << 22
_POPULATE_READ = 22
Identity = tuple[int, ...]
"""Device, inode, size, and the times of the last change of a file: equal as long as nobody writes it."""

_HEADER = "# Written by sae: 'sae verify' compares the files here with it, and so does 'sha256sum -c SHA256SUMS'.\n"
_LINE = re.compile(r"(# before )?([0-9a-f]{64})  ([^/\0\n]+)")
_OF_SHA256SUM = re.compile(rb"(\\?[0-9a-fA-F]{64} [ *].+|\\?SHA256 \(.+\) = [0-9a-fA-F]{64}|\s*|#.*)\r?")
_BYTES_A_DAMAGED_ONE = 16
"""The first line is the toolkit's if at most one in so many of its bytes is another."""
_BEFORE = "# before "
_TIMES_READ = 3
_MOST_BYTES = 1 << 28
_YOUNG_NS = 100_000_000
"""A file changed less than this ago may be changed again and keep its times."""
_PATIENCE_SECONDS = 10.0

_NUMBERED = {"checkpoints", "snapshots"}
PARTS = {"activations", "dictionary", "features", "probing", *_NUMBERED}
"""Folders in a run folder; of those that are numbered, folders in them hold files."""

_WAYS_OUT = {
    SUMS: "restore it from a copy, or delete it: the files beside it are then read without a check",
    "manifest.json": "delete the cache and harvest it anew",
    "config.yaml": "run the same 'sae run CONFIG' to write it anew after deleting it; to change a setting, edit a copy "
    "elsewhere or give KEY=VALUE",
    "config.json": "delete the dictionary's folder; in a run folder the same 'sae run' makes it again",
    "weights.safetensors": "delete the dictionary's folder; in a run folder the same 'sae run' makes it again",
    "state.pt": "delete its checkpoint's folder, and training goes on from the one before",
    "metrics.jsonl": "delete it: only the curves of the training are lost",
    "eval.json": "delete it and run the same 'sae run' or 'sae eval' again",
    "eval.md": "delete it and run the same 'sae run' or 'sae eval' again",
    "eval-documents.safetensors": "delete it and run the same 'sae run' or 'sae eval' again",
    "probe.json": "delete it and run the same 'sae probe' again",
    "compare.json": "delete it and run the same 'sae compare' again",
    "superposition.json": "delete it and run the same 'sae superposition' again",
    "sweep.json": "delete it and run the same 'sae sweep' again",
    **dict.fromkeys(
        ("features.json", "features.safetensors", "tokens.safetensors", "documents.json", "vocabulary.json"),
        "delete features.json and run the same 'sae features' to make the store again",
    ),
}


_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EIO, errno.EFAULT}
"""Errors that a file is to blame for; `EFAULT` is how a mapped one says that a piece of it cannot be read."""
_TRY_AGAIN = "check permissions and free memory, and run the same command again"
MORE_FILES = "let more files be open ('ulimit -n 4096'), and run the same command again"


class UnhashedWarning(UserWarning):
    """A file that the toolkit wrote has no hash beside it."""


class MissingWarning(UserWarning):
    """A file that the toolkit wrote is gone, and the result does without it."""


def way_out(path: Path) -> str:
    """What to do about a damaged file."""
    if path.name.startswith("effects"):
        return "delete it and run the same 'sae effects' again"
    return _WAYS_OUT.get(path.name, "delete it and run the command that made it again")


def damaged(path: Path, reason: str, remedy: str | None = None) -> DamagedError:
    """The error that names a damaged file and the way out."""
    return DamagedError(f"{str(path)!r}: {' '.join(reason.split())}; {remedy or way_out(path)}")


def unreadable(path: Path, error: Exception, remedy: str | None = None) -> DamagedError | UnreadableError:
    """The error of a file that the system does not read; where the machine is to blame, nothing is to be deleted."""
    if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
        way = MORE_FILES if error.errno in (errno.EMFILE, errno.ENFILE) else _TRY_AGAIN
        return UnreadableError(f"{str(path)!r}: cannot be read ({_reason(error)}); {way}")
    reason = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({_reason(error)})"
    return damaged(path, reason, remedy)


def is_leftover(name: str) -> bool:
    """Whether a file in a folder is the toolkit's book-keeping, or what a kill left of a file being written."""
    return name in (".lock", SUMS) or (name.startswith(".") and name.endswith(".tmp"))


def open_regular(path: Path, remedy: str | None = None) -> int:
    """A descriptor for reading; never waits, whatever stands in the file's place.

    Raises:
        DamagedError: there is no file, or something that is no regular file.
        UnreadableError: the machine cannot open it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, remedy) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise damaged(path, f"{_kind(mode)} where a file should be", remedy)
    return descriptor


def identity_of(state: os.stat_result) -> Identity:
    """See `Identity`."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def check(
    path: Path, expected: str | None = None, *, remedy: str | None = None, announce: bool = True
) -> Identity:  # fmt: skip
    """Compare a file with its hash; it is read at most once a process, unless it changes.

    Args:
        path: the file.
        expected: its hash, where that is not in `SHA256SUMS`.
        remedy: what to do if it is damaged; by default what its name says.
        announce: warn if it has no hash.

    Returns:
        What the file was when it was read: whoever opens it again can see whether it is still the same.

    Raises:
        DamagedError: the file is missing, no regular file, or differs from its hash.
        UnreadableError: the machine cannot read it.
    """
    digest, accepted, identity = "", (), ()
    for _ in range(_TIMES_READ):  # another process may replace it meanwhile
        accepted = recorded(path) if expected is None else (expected,)
        if not accepted:
            descriptor = open_regular(path, remedy)
            with os.fdopen(descriptor, "rb"):
                identity = identity_of(os.fstat(descriptor))
            if announce:
                announce_unhashed(path)
            return identity
        digest, identity = _digest(path, remedy)
        if digest in accepted:
            return identity
    raise _differs(path, digest, accepted, remedy)


def read_checked(
    path: Path, expected: str | None = None, *, most: int, remedy: str | None = None, announce: bool = True
) -> bytes:
    """The content of a file that fits into memory, of which the hash is taken that is compared.

    Args:
        path: the file.
        expected: its hash, where that is not in `SHA256SUMS`.
        most: bytes; a larger file is refused.
        remedy: what to do if it is damaged; by default what its name says.
        announce: warn if it has no hash.

    Raises:
        DamagedError: as `check`; or the file is larger.
    """
    digest, accepted = "", ()
    for _ in range(_TIMES_READ):
        accepted = recorded(path) if expected is None else (expected,)
        content = _read(path, most, remedy)
        if not accepted:
            if announce:
                announce_unhashed(path)
            return content
        digest = hashlib.sha256(content).hexdigest()
        if digest in accepted:
            return content
    raise _differs(path, digest, accepted, remedy)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; read at most once a process, unless it changes.

    Raises:
        DamagedError: it is missing or no regular file.
    """
    return _digest(path)[0]


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
    return _own_sums(folder) or {}


def _own_sums(folder: Path) -> dict[str, tuple[str, ...]] | None:
    """As `read_sums`, but None if the list is the user's."""
    path = folder / SUMS
    if not os.path.lexists(path):
        return {}
    sums: dict[str, tuple[str, ...]] = {}
    content = _read(path, _MOST_BYTES)
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
    return os.path.lexists(path) and _is_users(_read(path, _MOST_BYTES), folder)


def _is_users(content: bytes, folder: Path) -> bool:
    start = content[: len(_HEADER)]
    wrong = sum(here != there for here, there in zip(start, _HEADER.encode(), strict=False))
    if wrong <= len(start) // _BYTES_A_DAMAGED_ONE:
        return False
    if all(_OF_SHA256SUM.fullmatch(line) for line in content.split(b"\n")):
        return True
    return not any(os.path.lexists(folder / name) for name in _WAYS_OUT.keys() - {SUMS, "config.yaml"})


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
        sums = _own_sums(folder)
        if sums is None:
            yield
            return
        before = _right_now(path, sums.get(name, ()))
        _write_sums(folder, {**sums, name: (digest, *before)})
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                _write_sums(folder, sums)
            raise
        if before:
            with contextlib.suppress(OSError):  # both may stand until the next time
                _write_sums(folder, {**sums, name: (digest,)})


def record(path: Path) -> None:
    """Take the hash of a file as it is into `SHA256SUMS`, unless that is the user's.

    Raises:
        DamagedError: the file or the list cannot be read.
        CacheError: the list cannot hold the file's name.
        OSError: the list cannot be written.
    """
    with _alone(path.parent):
        sums = _own_sums(path.parent)
        if sums is not None:
            _write_sums(path.parent, {**sums, path.name: (_digest(path)[0],)})


def forget(path: Path) -> None:
    """Take a file out of `SHA256SUMS`, since it is deleted or will grow.

    Raises:
        DamagedError: the list cannot be read.
        OSError: it cannot be written.
    """
    if not recorded(path):
        return
    with _alone(path.parent):
        sums = _own_sums(path.parent)
        if sums is not None:
            sums.pop(path.name, None)
            _write_sums(path.parent, sums)


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
        _write_sums(folder, sums)


def clear_temporaries(folder: Path) -> None:
    """Delete what killed processes left half written; what a living one writes is locked and stays."""
    for path in folder.glob(".*-*.tmp"):
        with contextlib.suppress(OSError, DamagedError, UnreadableError), os.fdopen(open_regular(path), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside `path`, of a name that no other process uses, and its descriptor; deleted if still there.

    It is locked as long as it is open, so that `clear_temporaries` knows it from what a killed process left.
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


def announce_unhashed(path: Path) -> None:
    """Warn that a file has no hash: once for a run folder, or for another folder and those inside it."""
    path = path.absolute()
    folder = _run_of(path.parent) or path.parent
    if any(place in _ANNOUNCED for place in (folder, *folder.parents)):
        return
    _ANNOUNCED.add(folder)
    why, way = "as in folders written before there was one", ""
    if is_users(path.parent):
        why, way = "which sae did not write", f"rename that {SUMS}, and "
    warnings.warn(
        f"{str(folder)!r}: {path.relative_to(folder)} has no SHA-256 in {SUMS}, {why}: it is read, but damage would go "
        f"unnoticed; {way}'sae verify --record' on the folder adds hashes",
        UnhashedWarning,
        stacklevel=4,
    )


def announce_missing(path: Path, without: str) -> None:
    """Warn that a file which is not there stands in `SHA256SUMS`; one that was never written does not.

    Args:
        path: the file.
        without: what comes of its absence.

    Raises:
        DamagedError: `SHA256SUMS` cannot be read.
    """
    if recorded(path):
        warnings.warn(f"{str(path)!r}: missing, though {SUMS} lists it; {without}", MissingWarning, stacklevel=3)


def _run_of(folder: Path) -> Path | None:
    """The run folder that a folder is part of, by its name; None if there is none."""
    part = folder.parent if folder.parent.name in _NUMBERED else folder
    run = part.parent
    return run if part.name in PARTS and os.path.lexists(run / "config.yaml") else None


_ANNOUNCED: set[Path] = set()
_KNOWN: dict[Identity, str] = {}


def _digest(path: Path, remedy: str | None = None) -> tuple[str, Identity]:
    """SHA-256 of a file's content, and what the file was meanwhile."""
    for _ in range(_TIMES_READ):
        with os.fdopen(open_regular(path, remedy), "rb", buffering=0) as file:
            identity = identity_of(os.fstat(file.fileno()))
            if identity in _KNOWN:
                return _KNOWN[identity], identity
            try:
                digest = _hash_mapped(file.fileno(), identity[2])
                if digest is None:
                    digest = _hash_read(file.fileno())
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
    """The same without a copy, which would take a seventh of the time; None where the system cannot.

    Each piece is brought into memory first: what cannot be read is an error then, not a signal that ends the process.
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


def _read(path: Path, most: int, remedy: str | None = None) -> bytes:
    with os.fdopen(open_regular(path, remedy), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise damaged(path, f"{size:,} bytes, where at most {most:,} are read", remedy)
        try:
            return file.read(most + 1)
        except OSError as error:
            raise unreadable(path, error, remedy) from error


def _right_now(path: Path, listed: tuple[str, ...]) -> tuple[str, ...]:
    """The hash of what is there, if that is a file which is right or has no hash; else nothing."""
    if not path.is_file():
        return ()
    with contextlib.suppress(DamagedError, UnreadableError):
        digest, _ = _digest(path)
        return (digest,) if not listed or digest in listed else ()
    return ()


def _write_sums(folder: Path, sums: dict[str, tuple[str, ...]]) -> None:
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


def _differs(path: Path, digest: str, accepted: tuple[str, ...], remedy: str | None) -> DamagedError:
    return damaged(
        path, f"damaged or changed: its SHA-256 is {digest[:12]}… and should be {accepted[0][:12]}…", remedy
    )  # fmt: skip


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
