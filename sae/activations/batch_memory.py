"""Memory for batches, which is used again when nobody holds the batch that lay in it."""

from __future__ import annotations

import itertools
import mmap
import threading
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

_LEAST_BYTES = 1 << 20
"""Batches smaller than this share a piece of memory."""
_ALIGNED = 64
"""Multiple of bytes at which batches begin, as PyTorch's own memory does: products may depend on it."""


class BatchMemory:
    """Gives memory for batches of one shape.

    The system clears new memory page by page as it is first written to, which takes longer than reading a batch from
    the page cache. So a batch's memory is kept when the last tensor in it is gone, and given again.

    Args:
        rows: rows of a batch.
        width: numbers in a row.
        dtype: their type.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        self._bytes = -(-rows * width * dtype.itemsize // _ALIGNED) * _ALIGNED
        self._together = max(1, _LEAST_BYTES // self._bytes)
        self._free: deque[mmap.mmap] = deque()
        self._left: list[np.ndarray] = []
        self._taking = threading.Lock()

    def take(self) -> Shaped[Tensor, "batch d_in"]:
        """A tensor with undefined content and memory that no other tensor uses."""
        with self._taking:
            if not self._left:
                self._left = self._new_piece()
            piece = self._left.pop()
        numbers = torch.frombuffer(piece, dtype=self.dtype, count=self.rows * self.width)
        return numbers.view(self.rows, self.width)

    def _new_piece(self) -> list[np.ndarray]:
        """A piece of memory, cut into batches, that is free again when all of them are gone."""
        size = self._together * self._bytes
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        memory = self._free.pop() if self._free else mmap.mmap(-1, size, flags=private)
        piece = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(piece, self._free.append, memory).atexit = False
        return [piece[start : start + self._bytes] for start in range(0, size, self._bytes)]


@dataclass(frozen=True)
class StoredBatch:
    """A batch as stored, and the scale of each row for int8."""

    numbers: Shaped[Tensor, "batch d_in"]
    scale: Float[Tensor, " batch"] | None

    def __getitem__(self, rows: slice) -> StoredBatch:
        return StoredBatch(self.numbers[rows], None if self.scale is None else self.scale[rows])


class Filling:
    """Batches that are filled with the rows of a pool, one after the other.

    Args:
        memory: gives memory for them.
        begun: rows of all earlier pools: the first batch may hold the last of them.
    """

    def __init__(self, memory: BatchMemory, begun: int) -> None:
        self.memory, self.begun = memory, begun % memory.rows
        self._batches: list[StoredBatch] = []
        self._end = self.begun

    def room(self, rows: int) -> list[StoredBatch]:
        """Parts of batches for the next rows."""
        size, start = self.memory.rows, self._end
        self._end += rows
        while len(self._batches) * size < self._end:
            has_scale = self.memory.dtype == torch.int8
            scale = torch.empty(size, dtype=torch.float32, device="cpu") if has_scale else None
            self._batches.append(StoredBatch(self.memory.take(), scale))
        return [
            batch[max(start - first, 0) : self._end - first]
            for first, batch in zip(itertools.count(0, size), self._batches, strict=False)
            if start < first + size
        ]

    def adopt(self, rest: StoredBatch | None) -> None:
        """Begin the first batch with what was left of the pool before."""
        if rest is None:
            return
        if not self._batches:
            self._batches.append(rest)
            return
        first, last = self._batches[0][: self.begun], rest[: self.begun]
        first.numbers.copy_(last.numbers)
        if first.scale is not None and last.scale is not None:
            first.scale.copy_(last.scale)

    def complete(self) -> deque[StoredBatch]:
        """The batches without room, which are no longer held here."""
        count = self._end // self.memory.rows
        complete, self._batches = deque(self._batches[:count]), self._batches[count:]
        self._end -= count * self.memory.rows
        return complete

    def rest(self) -> StoredBatch | None:
        """The batch that still has room, after all others were taken."""
        return self._batches[0] if self._batches else None
