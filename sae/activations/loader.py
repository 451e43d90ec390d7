"""Shuffled batches from a cache: every eligible token once per epoch, in an order set by seed and position."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.background import background
from sae.activations.cache import ActivationCache, dequantise
from sae.activations.metadata import dictionary_metadata
from sae.config.splits import TRAIN
from sae.errors import CacheError
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import STREAMS, loader_generator_1, numpy_generator
from sae.numerics.statistics import Statistics


@dataclass(frozen=True)
class _Pool:
    """Rows of many random blocks, in random order."""

    activations: Tensor
    scale: Tensor | None


class ActivationLoader:
    """Endless batches `[batch_size, d_in]` of float32 activations, shuffled over tokens.

    The cache is cut into blocks of consecutive rows. An epoch permutes the blocks, gathers them into pools of about
    `pool_tokens` rows from all over the cache, and permutes the rows of each pool. The state consists of the rows
    consumed so far and the version of the random streams; a loader with that state continues exactly there. The next
    pool fills while the current one is used, so `pool_bytes` counts two. A loader also keeps one byte per row of the
    cache: whether the row is eligible.

    Args:
        cache: the cache that holds the activations.
        hook: hook point.
        batch_size: rows per batch.
        seed: seed of the shuffle.
        purpose: purpose of the shuffle; orders for different purposes are independent, whatever their seeds.
        pool_tokens: rows shuffled together.
        block_tokens: consecutive rows read together; smaller mixes more finely, larger reads faster.
        device: device of the batches; rows are copied there as stored and then converted to float32.

    Raises:
        CacheError: the hook point is not in the cache, or no token is eligible.
    """

    def __init__(
        self,
        cache: ActivationCache,
        hook: str,
        *,
        batch_size: int,
        seed: int = 0,
        purpose: str = "training",
        pool_tokens: int = 262_144,
        block_tokens: int = 64,
        device: str | torch.device = "cpu",
        split: str = TRAIN,
    ) -> None:
        self.cache, self.hook, self.split = cache, hook, split
        self.d_in = cache.d_in(hook)
        self.batch_size, self.seed, self.block_tokens = batch_size, seed, min(block_tokens, pool_tokens)
        self.device = torch.device(device)
        self.position, self.purpose, self.streams = 0, purpose, STREAMS
        with cache.checking("tokens", split) as begin:
            checks = [begin(number) for number in range(cache.shards(split))]
            self._eligible_rows = [cache.eligible_shard(split, n) for n, check in enumerate(checks) if check.result()]
        self._shard, self._start, self._eligible = self._find_blocks()
        self.tokens_per_epoch = int(self._eligible.sum())
        if self.tokens_per_epoch == 0:
            raise CacheError(
                f"cache {str(cache.path)!r}: all {cache.rows(split):,} tokens are masked; nothing to train on"
            )
        self.pool_tokens = min(pool_tokens, self.tokens_per_epoch)

    @property
    def statistics(self) -> Statistics:
        """Mean and mean squared norm of the activations, from the cache's manifest."""
        return self.cache.statistics(self.hook)

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata for a dictionary trained on these activations: model, hook point, token policy and text."""
        return dictionary_metadata(self.cache, self.hook)

    @property
    def pool_bytes(self) -> int:
        """Memory of both pools, in bytes."""
        shard, scale = self.cache.activation_shard(self.hook, self.split, 0)
        per_row = self.d_in * shard.element_size() + (4 if scale is not None else 0)
        return 2 * per_row * self.pool_tokens

    def state_dict(self) -> dict[str, int]:
        """The position, and the version of the random streams that determine the order."""
        return {"position": self.position, "streams": self.streams}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a state, in the order it was saved with; takes effect on the next `iter`.

        Raises:
            CacheError: the order is of an unknown version.
        """
        streams = state.get("streams", 1)
        if streams not in (1, STREAMS):
            raise CacheError(
                f"a loader's state has streams={streams!r}, but this version knows 1 to {STREAMS}: continue with the "
                "version of sae that wrote it, or newer"
            )
        self.position, self.streams = state["position"], streams

    def restart(self) -> None:
        """Go to the start of the current version's order; takes effect on the next `iter`."""
        self.position, self.streams = 0, STREAMS

    @property
    def token_text(self) -> tuple[str | None, str]:
        """Hash of the cache's text, and the path of the cache."""
        return self.cache.manifest.text_sha256, str(self.cache.path)

    @property
    def token_order(self) -> tuple[object, ...]:
        """Everything that determines the order of tokens; loaders read side by side must have the same."""
        return (
            self.split, self.seed, self.purpose, self.streams, self.tokens_per_epoch, self.pool_tokens,
            self.block_tokens,
        )  # fmt: skip

    @in_own_modes
    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        parts: list[Tensor] = []
        missing = self.batch_size
        for pool in self._pools():
            start, rows = 0, len(pool.activations)
            while start < rows:
                stop = min(start + missing, rows)
                parts.append(self._rows(pool, start, stop))
                missing -= stop - start
                start = stop
                if missing == 0:
                    self.position += self.batch_size
                    yield parts[0] if len(parts) == 1 else torch.cat(parts)
                    parts, missing = [], self.batch_size

    def _rows(self, pool: _Pool, start: int, stop: int) -> Float[Tensor, "rows d_in"]:
        scale = None if pool.scale is None else pool.scale[start:stop].to(self.device, non_blocking=True)
        rows = pool.activations[start:stop].to(self.device, non_blocking=True)
        converted = dequantise(rows, scale)
        return converted.clone() if converted.data_ptr() == pool.activations[start:stop].data_ptr() else converted

    def _pools(self) -> Iterator[_Pool]:
        """Pools from the current position, epoch after epoch; the first is cut to start there."""
        with background(1) as executor:
            plans = self._plans()
            blocks, order, skip = next(plans)
            memory, other = self._new_pool(), self._new_pool()
            filling: Future[_Pool] = executor.submit(self._fill, memory, blocks, order)
            for blocks, order, _ in plans:
                pool = filling.result()
                if self.device.type == "cuda":  # copies from the previous pool must end before it is refilled
                    torch.cuda.current_stream(self.device).synchronize()
                memory, other = other, memory  # the previous pool is used up: its memory holds the next one
                filling = executor.submit(self._fill, memory, blocks, order)
                yield _Pool(pool.activations[skip:], None if pool.scale is None else pool.scale[skip:])
                skip = 0

    def _plans(self) -> Iterator[tuple[np.ndarray, Tensor, int]]:
        """(blocks, place of each of their rows, rows to skip) of every pool from the current position."""
        epoch, offset = divmod(self.position, self.tokens_per_epoch)
        while True:
            blocks = self._generator(epoch, 0).permutation(len(self._eligible))
            ends = np.cumsum(self._eligible[blocks])
            cuts = [0]
            while cuts[-1] < len(blocks):
                filled = ends[cuts[-1] - 1] if cuts[-1] else 0
                cuts.append(max(int(np.searchsorted(ends, filled + self.pool_tokens, side="right")), cuts[-1] + 1))
            for number, (first, last) in enumerate(pairwise(cuts)):
                before = int(ends[first - 1]) if first else 0
                rows = int(ends[last - 1]) - before
                if offset >= before + rows:
                    continue
                order = self._generator(epoch, number + 1).permutation(rows)
                yield blocks[first:last], torch.from_numpy(order), max(offset - before, 0)
            epoch, offset = epoch + 1, 0

    def _generator(self, epoch: int, number: int) -> np.random.Generator:
        """Generator for an epoch's blocks (number 0), or for the rows of one of its pools (numbers 1, 2, …)."""
        if self.streams == 1:
            return loader_generator_1(self.seed, epoch, number)
        return numpy_generator(f"order of tokens: {self.purpose}", self.seed, epoch, number)

    def _new_pool(self) -> _Pool:
        example, scale = self.cache.activation_shard(self.hook, self.split, 0)
        pinned = self.device.type == "cuda"
        with torch.inference_mode(False):  # it is filled by another thread, outside the caller's mode
            pool = torch.empty(self.pool_tokens, self.d_in, dtype=example.dtype, pin_memory=pinned)
            return _Pool(pool, None if scale is None else torch.empty(self.pool_tokens, pin_memory=pinned))

    def _fill(self, memory: _Pool, blocks: np.ndarray, order: Int[Tensor, " rows"]) -> _Pool:
        """Read blocks in the cache's order, and put each row directly in its place in the shuffled pool."""
        pool = memory.activations[: len(order)]
        scales = None if memory.scale is None else memory.scale[: len(order)]
        offset = 0
        blocks = np.sort(blocks)
        shards = self._shard[blocks]
        with self.cache.checking(self.hook, self.split) as begin:
            checks = {number: begin(number) for number in np.unique(shards).tolist()}
            for number, check in checks.items():
                check.result()
                activations, scale = self.cache.activation_shard(self.hook, self.split, number)
                starts = torch.from_numpy(self._start[blocks[shards == number]])
                eligible = self._eligible_rows[number]
                rows = (starts[:, None] + torch.arange(self.block_tokens)).flatten()
                rows = rows[rows < len(activations)]
                rows = rows[eligible[rows]]
                places = order[offset : offset + len(rows)]
                pool.index_copy_(0, places, activations.index_select(0, rows))
                if scales is not None and scale is not None:
                    scales.index_copy_(0, places, scale[rows])
                offset += len(rows)
        return _Pool(pool, scales)

    def _find_blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, first row within it, and number of eligible rows of every block."""
        shards, starts, counts = [], [], []
        for number, eligible in enumerate(self._eligible_rows):
            first = np.arange(0, len(eligible), self.block_tokens)
            shards.append(np.full(len(first), number))
            starts.append(first)
            counts.append(np.add.reduceat(eligible.numpy(), first, dtype=np.int64))
        return np.concatenate(shards), np.concatenate(starts), np.concatenate(counts)
