"""Threads that work ahead of a reader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def background(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool for the body. At the end, pending work is cancelled and running work is not waited for.

    A generator that reads ahead may be abandoned, and then ends when the garbage collector finds it. That can happen
    while a thread is being started, when waiting for another thread would never end: Python's `threading` then holds a
    lock that the end of a thread needs.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        try:
            pool.shutdown(wait=False, cancel_futures=True)
        except AttributeError:  # interpreter shutdown: threads have ended, and modules needed to cancel are gone
            pool.shutdown(wait=False)
