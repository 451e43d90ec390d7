"""A text that a thread writes while the model already runs over the shards that are finished."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class TextAhead:
    """Files of a text, written by a thread of their own.

    Args:
        write: writes them, calls its argument with the name of each once it is finished, and returns remarks.
    """

    def __init__(self, write: Callable[[Callable[[str], None]], list[str]]) -> None:
        self._finished: set[str] = set()
        self._change = threading.Condition()
        self._stopped = False
        self._thread = ThreadPoolExecutor(1)
        self._writing = self._thread.submit(write, self._finish)
        self._writing.add_done_callback(self._ended)

    def wait_for(self, name: str) -> None:
        """Wait until a file is finished.

        Raises:
            Exception: whatever `write` raised.
        """
        with self._change:
            self._change.wait_for(lambda: name in self._finished or self._writing.done())
        if name not in self._finished:
            self.wait()
            raise FileNotFoundError(name)

    def is_whole(self) -> bool:
        """Whether all files are finished."""
        return self._writing.done() and self._writing.exception() is None

    def wait(self) -> list[str]:
        """Wait until all files are finished; returns the remarks.

        Raises:
            Exception: whatever `write` raised.
        """
        return self._writing.result()

    def close(self) -> None:
        """End the thread, at the latest when the file is finished that it is writing."""
        self._stopped = True
        self._thread.shutdown()

    def _finish(self, name: str) -> None:
        if self._stopped:
            raise _StoppedError
        with self._change:
            self._finished.add(name)
            self._change.notify_all()

    def _ended(self, _: Future[list[str]]) -> None:
        with self._change:
            self._change.notify_all()


class _StoppedError(Exception):
    """Nobody needs the text any more."""
