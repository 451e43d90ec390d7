"""Errors for damaged and unreadable files, each with a way out."""

from __future__ import annotations

import errno
from pathlib import Path

from sae.errors import DamagedError, UnreadableError

SUMS = "SHA256SUMS"
NUMBERED = {"checkpoints", "snapshots"}
PARTS = {"activations", "dictionary", "features", "probing", *NUMBERED}
"""Folders in a run folder; those in `NUMBERED` have subfolders that hold the files."""
WAYS_OUT = {
    SUMS: "restore it from a copy, or delete it: the files next to it are then read without a check",
    "manifest.json": "delete the cache and harvest it again",
    "config.yaml": "run the same 'sae run CONFIG' to write it again after deleting it; to change a setting, edit a "
    "copy elsewhere or give KEY=VALUE",
    "config.json": "delete the dictionary's folder; in a run folder the same 'sae run' makes it again",
    "weights.safetensors": "delete the dictionary's folder; in a run folder the same 'sae run' makes it again",
    "state.pt": "delete its checkpoint's folder, and training continues from the one before",
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
_FILE_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EIO, errno.EFAULT}
"""Errors caused by the file itself; a mapped file raises `EFAULT` if a piece of it cannot be read."""
_TRY_AGAIN = "check permissions and free memory, and run the same command again"
MORE_FILES = "let more files be open ('ulimit -n 4096'), and run the same command again"


def way_out(path: Path) -> str:
    """Advice on a damaged file."""
    if path.name.startswith("effects"):
        return "delete it and run the same 'sae effects' again"
    return WAYS_OUT.get(path.name, "delete it and run the command that made it again")


def damaged(path: Path, reason: str, remedy: str | None = None) -> DamagedError:
    """The error for a damaged file, with the way out."""
    return DamagedError(f"{str(path)!r}: {' '.join(reason.split())}; {remedy or way_out(path)}")


def unreadable(path: Path, error: Exception, remedy: str | None = None) -> DamagedError | UnreadableError:
    """The error for a file that the system cannot read; if the machine is the cause, it does not advise deletion."""
    if isinstance(error, OSError) and error.errno not in _FILE_ERRORS:
        advice = MORE_FILES if error.errno in (errno.EMFILE, errno.ENFILE) else _TRY_AGAIN
        return UnreadableError(f"{str(path)!r}: cannot be read ({_reason(error)}); {advice}")
    reason = "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({_reason(error)})"
    return damaged(path, reason, remedy)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
