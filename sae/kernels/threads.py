"""Threads for code that releases Python's lock: each takes a part of the rows or features of one computation."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from threading import Barrier

import torch

_THREADS: ContextVar[int | None] = ContextVar("threads", default=None)


@contextlib.contextmanager
def operators_in_one_thread() -> Iterator[None]:
    """Inside `with`, PyTorch's operators use one thread, and `in_parts` as many as it would outside.

    OpenMP's threads stay awake for milliseconds after an operator, on cores that parts could use. That costs more than
    a second thread gains in operators on small tensors.
    """
    threads = torch.get_num_threads()
    token = _THREADS.set(threads)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _THREADS.reset(token)


def in_parts(function: Callable[[int, int], object], length: int, most: int | None = None) -> None:
    """Call function(start, stop) for consecutive parts of range(length), in as many threads as PyTorch uses.

    PyTorch's operators use one thread in each, so that parts may call them.

    Args:
        function: what to compute; parts must not write what other parts read or write.
        length: number of rows or features.
        most: largest part; None: one part for each thread.
    """
    threads = _THREADS.get() or torch.get_num_threads()
    size = max(1, min(-(-length // threads), most or length))
    starts = range(0, length, size)
    if threads == 1 or len(starts) < 2:
        for start in starts:
            function(start, min(start + size, length))
        return
    list(_pool(threads).map(lambda start: function(start, min(start + size, length)), starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that wait without using a core, unlike OpenMP's, and stay for the next call."""
    all_started, before = Barrier(threads), torch.get_num_threads()

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread sets the number that others have
        torch.set_num_threads(1)
        all_started.wait()

    pool = ThreadPoolExecutor(threads, "sae-kernels", begin)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(before)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
