"""Pools of a cache's rows, each read while the one before is used, and given as batches."""

from __future__ import annotations

import contextlib
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae.activations.background import background
from sae.activations.batch_memory import BatchMemory, Filling, StoredBatch
from sae.activations.cache import ActivationCache, dequantise
from sae.activations.joined_rows import JoinedRows
from sae.activations.order import PoolPlan, TokenOrder
from sae.activations.shard_rows import ShardRows, as_rows, until_unchanged
from sae.numerics.transfer import Event, Transfer

READERS = 8
"""Threads that read: a disk reaches its speed with several requests at a time."""
_HOST_PIECE, _MAPPED_PIECE, _DEVICE_PIECE = 1 << 20, 8 << 20, 8 << 20
"""Bytes that a thread reads in one go: on the host they stay in the processor's cache, and are dropped."""
_GATHERED, _ROWS_PER_LOOK = 4 << 20, 64
"""Bytes gathered together, at least; and rows for each file, whose state is looked at afterwards."""


@dataclass(frozen=True)
class _Part:
    """Rows that a pool needs of a shard, and the number of the first among all rows of the pool, as stored."""

    shard: ShardRows
    rows: Int[np.ndarray, " rows"]
    first: int


@dataclass
class _Lent:
    """A buffer, and when what was in it is copied."""

    buffer: Tensor
    copied: Event | None = None


def _fresh(plan: PoolPlan) -> Int[np.ndarray, " rows"]:
    """The place of each row that has not been used, among those that have not."""
    places = plan.places.numpy()
    return places[places >= plan.skip] - plan.skip if plan.skip else places


class Pools(ABC):
    """Batches of the rows of one pool after the other, as stored; only int8 is converted, to float32.

    Args:
        cache: the cache that holds the rows.
        hook: hook point.
        order: the order of its tokens.
        transfer: copies to the device that the pools are on.
        piece_bytes: what a thread reads in one go.
    """

    def __init__(
        self, cache: ActivationCache, hook: str, order: TokenOrder, transfer: Transfer, piece_bytes: int
    ) -> None:
        self.cache, self.hook, self.order, self.transfer = cache, hook, order, transfer
        self.width, self.dtype = cache.d_in(hook), cache.stored_dtype
        self._piece = min(self._rows_of(piece_bytes), order.pool_tokens)
        self._buffers: queue.SimpleQueue[_Lent] = queue.SimpleQueue()
        self._shards: dict[int, ShardRows] = {}

    @abstractmethod
    def batches(self, plans: Iterator[PoolPlan], rows: int) -> Generator[Shaped[Tensor, "batch d_in"], None, None]:
        """Batches of `rows` rows.

        Raises:
            CacheError: a shard is damaged or cannot be read.
        """

    def _parts(self, plan: PoolPlan) -> Iterator[_Part]:
        """What a pool needs of each shard, in the order of the text, without rows that have been used already."""
        used = first = 0
        with self.cache.checking(self.hook, self.order.split) as begin:
            checks = {n: begin(n) for n in self.order.shards_of(plan) if n not in self._shards}
            for number, rows in self.order.reads(plan):
                if number in checks:
                    checks[number].result()
                    self._shards[number] = self.cache.shard_rows(self.hook, self.order.split, number)
                places = plan.places[used : used + len(rows)].numpy()
                used += len(rows)
                left = rows[places >= plan.skip] if plan.skip else rows
                if len(left):
                    yield _Part(self._shards[number], left, first)
                first += len(left)

    def _read(
        self, parts: Sequence[_Part], readers: ThreadPoolExecutor, take: Callable[[Tensor, int], Event | None]
    ) -> None:
        """Read rows in the order of the text, by several threads.

        Args:
            parts: what to read.
            readers: the threads.
            take: called by them with rows that have been read and the number of the first; returns when they are
                copied, if it only begins to copy them.
        """
        while self._buffers.qsize() < READERS:
            self._buffers.put(_Lent(self.transfer.host_memory(self._piece, self.width, dtype=self.dtype)))

        def read(part: _Part, start: int) -> None:
            rows = part.rows[start : start + self._piece]
            with self._lent() as lent:
                part.shard.read(rows, as_rows(lent.buffer)[: len(rows)])
                lent.copied = take(lent.buffer[: len(rows)], part.first + start)

        pieces = [(part, start) for part in parts for start in range(0, len(part.rows), self._piece)]
        for begun in [readers.submit(read, *piece) for piece in pieces]:
            begun.result()

    def _rows_of(self, size: int) -> int:
        """Rows of so many bytes, at least one."""
        return max(1, size // (self.width * self.dtype.itemsize))

    @contextlib.contextmanager
    def _lent(self) -> Iterator[_Lent]:
        """A buffer that no other thread uses, and that nothing is copied from any more."""
        lent = self._buffers.get()
        try:
            if lent.copied is not None:
                lent.copied.synchronize()
            yield lent
        finally:
            self._buffers.put(lent)

    @staticmethod
    def _scale(parts: Sequence[_Part]) -> Float[Tensor, " rows"] | None:
        """The scale of each row, for int8."""
        scales = [part.shard.scale[torch.from_numpy(part.rows)] for part in parts if part.shard.scale is not None]
        return torch.cat(scales) if scales else None


@dataclass(frozen=True)
class _HostPool:
    """Rows in the page cache, and the order in which they are used.

    Attributes:
        shards: the files that hold them.
        source: the files where they are mapped into memory.
        order: for each row, in the order of use, its place in `source`.
        scale: of each row, in the order of use, for int8.
    """

    shards: Sequence[ShardRows]
    source: JoinedRows
    order: Int[Tensor, " rows"]
    scale: Float[Tensor, " rows"] | None

    def gather(self, room: Sequence[StoredBatch], start: int) -> None:
        """Copy rows to batches, from some place in the order of use on.

        Raises:
            CacheError: a file was written to, and differs from its hash.
        """
        until_unchanged(self.shards, lambda: self._copy(room, start))

    def _copy(self, room: Sequence[StoredBatch], start: int) -> None:
        for part in room:
            rows = slice(start, start + len(part.numbers))
            torch.index_select(self.source.tensor, 0, self.order[rows], out=part.numbers)
            if self.scale is not None and part.scale is not None:
                part.scale.copy_(self.scale[rows])
            start = rows.stop


class HostPools(Pools):
    """Pools in the page cache, into which the next one is read if it is not there, while the one before is used.

    On Linux the system reads it where the files are mapped, without copying; elsewhere threads read and drop it.

    Batches are gathered when they are due, a few at a time, from where the files are mapped: each row is copied once.
    """

    def __init__(self, cache: ActivationCache, hook: str, order: TokenOrder) -> None:
        super().__init__(cache, hook, order, Transfer(torch.device("cpu")), _HOST_PIECE)

    def batches(self, plans: Iterator[PoolPlan], rows: int) -> Generator[Shaped[Tensor, "batch d_in"], None, None]:
        filling = Filling(BatchMemory(rows, self.width, self.dtype))
        with background(1) as preparer, background(READERS) as readers:
            coming = preparer.submit(self._prepare, plans, readers)
            while True:
                pool = coming.result()
                coming = preparer.submit(self._prepare, plans, readers)
                few = max(rows, self._rows_of(_GATHERED), _ROWS_PER_LOOK * len(pool.shards))
                for start in range(0, len(pool.order), few):
                    pool.gather(filling.room(min(few, len(pool.order) - start)), start)
                    for batch in filling.complete():
                        yield batch.numbers if batch.scale is None else dequantise(batch.numbers, batch.scale)
                        del batch  # so that its memory can be used again

    def _map(self, parts: Sequence[_Part], readers: ThreadPoolExecutor) -> list[bool]:
        """Have the system read rows into the page cache; for each part, whether it did."""
        rows = self._rows_of(_MAPPED_PIECE)
        begun = [
            [readers.submit(part.shard.map, part.rows[n : n + rows]) for n in range(0, len(part.rows), rows)]
            for part in parts
        ]
        mapped = [[piece.result() for piece in pieces] for pieces in begun]
        return [all(pieces) for pieces in mapped]

    def _prepare(self, plans: Iterator[PoolPlan], readers: ThreadPoolExecutor) -> _HostPool:
        plan = next(plans)
        parts, places = list(self._parts(plan)), _fresh(plan)
        if not all(part.shard.is_cached(part.rows) for part in parts):
            mapped = self._map(parts, readers)
            if unmapped := [part for part, is_mapped in zip(parts, mapped, strict=True) if not is_mapped]:
                self._read(unmapped, readers, lambda rows, first: None)  # what is read stays in the page cache
        source = JoinedRows([part.shard.activations for part in parts])
        order = np.empty_like(places)
        for number, part in enumerate(parts):
            order[places[part.first : part.first + len(part.rows)]] = source.places(number, part.rows)
        scale = self._scale(parts)
        if scale is not None:
            scale = torch.empty_like(scale).index_copy_(0, torch.from_numpy(places), scale)
        return _HostPool([part.shard for part in parts], source, torch.from_numpy(order), scale)


@dataclass(frozen=True)
class _Pool:
    """Rows on the device in the order in which they were read, and the order in which they are used.

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
    """Pools in the memory of a device: rows are copied there once, in the order of the text, and gathered by index.

    Args:
        cache, hook, order: as for `Pools`.
        transfer: copies to the device.
    """

    def __init__(self, cache: ActivationCache, hook: str, order: TokenOrder, transfer: Transfer) -> None:
        super().__init__(cache, hook, order, transfer, _DEVICE_PIECE)

    def batches(self, plans: Iterator[PoolPlan], rows: int) -> Generator[Shaped[Tensor, "batch d_in"], None, None]:
        parts: list[Tensor] = []
        missing = rows
        with contextlib.closing(self._pools(plans)) as pools:
            for pool in pools:
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

    def _pools(self, plans: Iterator[PoolPlan]) -> Generator[_Pool, None, None]:
        memory, other = (
            self.transfer.device_memory(self.order.pool_tokens, self.width, dtype=self.dtype) for _ in range(2)
        )
        with background(1) as filler, background(READERS) as readers:
            filling = filler.submit(self._fill, plans, memory, readers)
            while True:
                pool = filling.result()
                self.transfer.follow()  # the batches of the pool before are gathered before its memory is filled again
                memory, other = other, memory
                filling = filler.submit(self._fill, plans, memory, readers)
                self.transfer.receive(pool.filled, *pool.tensors)
                yield pool

    def _fill(self, plans: Iterator[PoolPlan], memory: Tensor, readers: ThreadPoolExecutor) -> _Pool:
        plan = next(plans)
        parts = list(self._parts(plan))
        self._read(parts, readers, lambda rows, first: self.transfer.copy(rows, memory[first : first + len(rows)]))
        places = torch.from_numpy(_fresh(plan))
        order = torch.empty_like(places)
        order[places] = torch.arange(len(places))
        order, filled = self._send(order)
        if (scale := self._scale(parts)) is not None:
            scale, filled = self._send(scale)
        return _Pool(memory, order, scale, filled)

    def _send(self, numbers: Tensor) -> tuple[Tensor, Event]:
        target = self.transfer.device_memory(len(numbers), dtype=numbers.dtype)
        return target, self.transfer.copy(numbers, target)
