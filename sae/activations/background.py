"""Threads that work ahead of whoever reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def background(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for as long as the body runs; at the end what has not begun is left, and nobody waits for the rest.

    A generator that reads ahead may be left in the middle, and then ends whenever the garbage collector finds it: also
    while a thread is being started, where waiting for another one would never end (Python's `threading` holds a lock
    there that the end of a thread needs).
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        try:
            pool.shutdown(wait=False, cancel_futures=True)
        except AttributeError:  # Python is ending: threads have ended, and modules that cancelling needs are gone
            pool.shutdown(wait=False)
