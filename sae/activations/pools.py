"""Pools of a cache's rows, each read by several threads while the one before is used, and given as batches."""

from __future__ import annotations

import contextlib
import queue
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae.activations.background import background
from sae.activations.batch_memory import BatchMemory
from sae.activations.cache import ActivationCache, dequantise
from sae.activations.order import PoolPlan, TokenOrder
from sae.numerics.transfer import Event, Transfer

READERS = 8
"""Threads that read: disks reach their speed with several requests at a time."""
PIECE_BYTES = 8 << 20
"""What a thread reads in one go."""


class Pools(ABC):
    """Batches of the rows of one pool after the other, as stored; int8 is converted to float32.

    Args:
        cache: the cache that holds the rows.
        hook: hook point.
        order: the order of its tokens.
    """

    def __init__(self, cache: ActivationCache, hook: str, order: TokenOrder) -> None:
        self.cache, self.hook, self.order = cache, hook, order
        self.width, self.dtype = cache.d_in(hook), cache.stored_dtype
        self.row_bytes = self.width * self.dtype.itemsize
        self.piece_rows = max(1, PIECE_BYTES // self.row_bytes)

    @abstractmethod
    def batches(self, plans: Iterator[PoolPlan], rows: int) -> Generator[Shaped[Tensor, "batch d_in"], None, None]:
        """Batches of `rows` rows."""

    def read(
        self, plan: PoolPlan, readers: ThreadPoolExecutor, copy: Callable[[int, Int[np.ndarray, " rows"], int], None]
    ) -> Float[Tensor, " rows"] | None:
        """Read the rows of a pool that have not been used, in the order in which they are stored.

        Args:
            plan: the pool.
            readers: the threads that read.
            copy: called by them with a shard's number, some of its rows, and the number of the first among all that
                are read.

        Returns:
            The scale of each row, for int8.

        Raises:
            CacheError: a shard is damaged or cannot be read.
        """
        fresh, used, read = plan.places.numpy() >= plan.skip, 0, 0
        scales, copies = [], []
        with self.cache.checking(self.hook, self.order.split) as begin:
            checks = {number: begin(number) for number in self.order.shards_of(plan)}
            for number, check in checks.items():
                check.result()
                eligible = self.order.rows_of(plan, number).numpy()
                rows = eligible[fresh[used : used + len(eligible)]]
                _, scale = self.cache.activation_shard(self.hook, self.order.split, number)
                if scale is not None:
                    scales.append(scale[torch.from_numpy(rows)])
                copies += [
                    readers.submit(copy, number, rows[start : start + self.piece_rows], read + start)
                    for start in range(0, len(rows), self.piece_rows)
                ]
                used, read = used + len(eligible), read + len(rows)
        for begun in copies:
            begun.result()
        return torch.cat(scales) if scales else None


@dataclass(frozen=True)
class _Batches:
    """Batches of which the last may be incomplete.

    Attributes:
        stored: their numbers.
        scales: of each batch, for int8.
        rows: rows in all.
    """

    stored: deque[Tensor]
    scales: deque[Tensor]
    rows: int


class HostPools(Pools):
    """Pools in the memory of the host: each row is read straight to its place in its batch."""

    def batches(self, plans: Iterator[PoolPlan], rows: int) -> Generator[Shaped[Tensor, "batch d_in"], None, None]:
        memory = BatchMemory(rows, self.width, self.dtype)
        with background(1) as filler, background(READERS) as readers:
            filling = filler.submit(self._fill, plans, _Batches(deque(), deque(), 0), memory, readers)
            while True:
                pool = filling.result()
                complete, rest = divmod(pool.rows, rows)
                unfinished = _Batches(deque(), deque(), rest)
                if rest:
                    unfinished.stored.append(pool.stored.pop())
                    unfinished.scales.extend(pool.scales.pop() for _ in range(bool(pool.scales)))
                filling = filler.submit(self._fill, plans, unfinished, memory, readers)
                for _ in range(complete):
                    batch = pool.stored.popleft()
                    yield dequantise(batch, pool.scales.popleft()) if pool.scales else batch
                    del batch  # so that its memory can be used again

    def _fill(
        self, plans: Iterator[PoolPlan], begun: _Batches, memory: BatchMemory, readers: ThreadPoolExecutor
    ) -> _Batches:
        """Read the next pool into batches, of which the first may have been begun with the end of the pool before."""
        plan = next(plans)
        places = plan.places.numpy()
        places = places[places >= plan.skip] - plan.skip + begun.rows
        total = begun.rows + len(places)
        stored = begun.stored
        while len(stored) * memory.rows < total:
            stored.append(memory.take())
        number, row = np.divmod(places, memory.rows)
        addresses = np.array([batch.data_ptr() for batch in stored])[number] + row * self.row_bytes
        scale = self.read(plan, readers, partial(self._copy, stored, addresses))
        scales = deque[Tensor]()
        if scale is not None:
            by_row = torch.empty(len(stored), memory.rows, dtype=torch.float32)
            for first in begun.scales:
                by_row[0] = first
            by_row.view(-1)[torch.from_numpy(places)] = scale
            scales.extend(by_row.unbind())
        return _Batches(stored, scales, total)

    def _copy(
        self, owners: deque[Tensor], addresses: Int[np.ndarray, " pool"], shard: int, rows: Int[np.ndarray, " rows"],
        first: int,
    ) -> None:  # fmt: skip
        """Read rows of a shard to their addresses; as long as a thread does, it holds the memory's owners."""
        self.cache.copy_rows(self.hook, self.order.split, shard, rows, addresses[first : first + len(rows)])


@dataclass(frozen=True)
class _Pool:
    """Rows on the device as they were read, and the order in which they are used.

    Attributes:
        memory: holds the rows, and perhaps others behind them.
        order: for each row, in the order of use, its place in `memory`.
        scale: of each row in `memory`, for int8.
        filled: when all of this is there.
    """

    memory: Tensor
    order: Tensor
    scale: Tensor | None
    filled: Event

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.memory, self.order, self.scale) if x is not None]


class DevicePools(Pools):
    """Pools in the memory of a device: rows are copied there once, as read, and gathered there by index.

    Args:
        cache, hook, order: as for `Pools`.
        transfer: copies to the device.
    """

    def __init__(self, cache: ActivationCache, hook: str, order: TokenOrder, transfer: Transfer) -> None:
        super().__init__(cache, hook, order)
        self.transfer = transfer

    def batches(self, plans: Iterator[PoolPlan], rows: int) -> Generator[Shaped[Tensor, "batch d_in"], None, None]:
        parts: list[Tensor] = []
        missing = rows
        for pool in self._pools(plans):
            start = 0
            while start < len(pool.order):
                chosen = pool.order[start : start + missing]
                gathered = pool.memory.index_select(0, chosen)
                parts.append(gathered if pool.scale is None else dequantise(gathered, pool.scale[chosen]))
                missing -= len(chosen)
                start += len(chosen)
                if missing == 0:
                    yield parts[0] if len(parts) == 1 else torch.cat(parts)
                    parts, missing = [], rows

    def _pools(self, plans: Iterator[PoolPlan]) -> Iterator[_Pool]:
        size = self.order.pool_tokens
        memory, other = (self.transfer.device_memory(size, self.width, dtype=self.dtype) for _ in range(2))
        buffers = _Buffers(self.transfer, min(self.piece_rows, size), self.width, self.dtype)
        with background(1) as filler, background(READERS) as readers:
            filling = filler.submit(self._fill, plans, memory, buffers, readers)
            while True:
                pool = filling.result()
                self.transfer.follow()  # the batches of the pool before are gathered before its memory is filled again
                memory, other = other, memory
                filling = filler.submit(self._fill, plans, memory, buffers, readers)
                self.transfer.receive(pool.filled, *pool.tensors)
                yield pool

    def _fill(self, plans: Iterator[PoolPlan], memory: Tensor, buffers: _Buffers, readers: ThreadPoolExecutor) -> _Pool:
        plan = next(plans)
        scale = self.read(plan, readers, partial(self._copy, memory, buffers))
        places = plan.places[plan.places >= plan.skip] - plan.skip
        order = torch.empty_like(places)
        order[places] = torch.arange(len(places))
        order, filled = self._send(order)
        if scale is not None:
            scale, filled = self._send(scale)
        return _Pool(memory, order, scale, filled)

    def _copy(self, memory: Tensor, buffers: _Buffers, shard: int, rows: Int[np.ndarray, " rows"], first: int) -> None:
        """Read rows of a shard into a buffer, and begin to copy them to their place on the device."""
        with buffers.borrowed() as lent:
            addresses = lent.buffer.data_ptr() + np.arange(len(rows)) * self.row_bytes
            self.cache.copy_rows(self.hook, self.order.split, shard, rows, addresses)
            lent.copied = self.transfer.copy(lent.buffer[: len(rows)], memory[first : first + len(rows)])

    def _send(self, numbers: Tensor) -> tuple[Tensor, Event]:
        target = self.transfer.device_memory(len(numbers), dtype=numbers.dtype)
        return target, self.transfer.copy(numbers, target)


@dataclass
class _Lent:
    buffer: Tensor
    copied: Event | None = None


class _Buffers:
    """Memory of the host that threads read into, one buffer each, and that is copied from."""

    def __init__(self, transfer: Transfer, rows: int, width: int, dtype: torch.dtype) -> None:
        self._free: queue.SimpleQueue[_Lent] = queue.SimpleQueue()
        for _ in range(READERS):
            self._free.put(_Lent(transfer.host_memory(rows, width, dtype=dtype)))

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[_Lent]:
        """A buffer that no thread reads into, and that nothing is copied from any more."""
        lent = self._free.get()
        try:
            if lent.copied is not None:
                lent.copied.synchronize()
            yield lent
        finally:
            self._free.put(lent)
