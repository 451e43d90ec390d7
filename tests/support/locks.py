"""Folders that somebody else works in."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from sae.files.writing import locked


@contextlib.contextmanager
def held_elsewhere(folder: Path, doing: str) -> Iterator[None]:
    """In the body another thread has the folder's lock, as another process would."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(folder, doing):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(60)
        yield
    finally:
        done.set()
        thread.join()
