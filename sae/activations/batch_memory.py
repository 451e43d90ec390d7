"""Memory for batches, which is used again when nobody holds the batch that lay in it."""

from __future__ import annotations

import itertools
import mmap
import weakref
from collections import deque
from collections.abc import Iterator
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

    def take(self) -> Shaped[Tensor, "batch d_in"]:
        """A tensor with undefined content and memory that no other tensor uses."""
        if not self._left:
            self._left = self._new_piece()
        numbers = torch.frombuffer(self._left.pop(), dtype=self.dtype, count=self.rows * self.width)
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
    """Batches that are filled with rows one after the other."""

    def __init__(self, memory: BatchMemory) -> None:
        self._memory = memory
        self._batches: deque[StoredBatch] = deque()
        self._end = 0

    def room(self, rows: int) -> list[StoredBatch]:
        """Parts of batches for the next rows."""
        size, start = self._memory.rows, self._end
        self._end += rows
        while len(self._batches) * size < self._end:
            has_scale = self._memory.dtype == torch.int8
            scale = torch.empty(size, dtype=torch.float32, device="cpu") if has_scale else None
            self._batches.append(StoredBatch(self._memory.take(), scale))
        return [
            batch[max(start - first, 0) : self._end - first]
            for first, batch in zip(itertools.count(0, size), self._batches, strict=False)
            if start < first + size
        ]

    def complete(self) -> Iterator[StoredBatch]:
        """The batches without room, which are no longer held here."""
        while self._end >= self._memory.rows:
            self._end -= self._memory.rows
            yield self._batches.popleft()
