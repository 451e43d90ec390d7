"""A folder that appears when it is complete."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sae.errors import CacheError


@contextlib.contextmanager
def complete_folder(target: Path) -> Iterator[Path]:
    """A folder next to the target that takes its place at the end, or is deleted if that is not reached.

    Args:
        target: it must be new or empty.

    Raises:
        CacheError: it cannot be made.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".unfinished", dir=target.parent))
        try:
            inner = unfinished / "files"
            inner.mkdir()  # with the usual permissions, which a temporary folder has not
            yield inner
            inner.replace(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise CacheError(
            f"cannot write {str(target)!r}: {error.strerror or error}; choose another folder or change its permissions"
        ) from error
