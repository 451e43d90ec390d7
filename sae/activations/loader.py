"""Shuffled batches from a cache: every eligible token once per epoch, in an order set by seed and position."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.background import background
from sae.activations.cache import ActivationCache, dequantise
from sae.activations.metadata import dictionary_metadata
from sae.activations.order import PoolPlan, ShuffledSource, TokenOrder
from sae.config.splits import TRAIN
from sae.numerics.modes import in_own_modes
from sae.numerics.statistics import Statistics


@dataclass(frozen=True)
class _Pool:
    """Rows of many random blocks, in random order."""

    activations: Tensor
    scale: Tensor | None


class ActivationLoader(ShuffledSource):
    """Endless batches `[batch_size, d_in]` of float32 activations, shuffled over tokens.

    The order is that of a `TokenOrder`: pools of about `pool_tokens` rows from all over the cache. The next pool fills
    while the current one is used, so `pool_bytes` counts two.

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
        self.d_in, self.device = cache.d_in(hook), torch.device(device)
        order = TokenOrder(
            cache, seed=seed, purpose=purpose, pool_tokens=pool_tokens, block_tokens=block_tokens, split=split
        )
        super().__init__(order, batch_size)

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
            plans = self.order.plans(self.position, self.streams)
            plan = next(plans)
            memory, other = self._new_pool(), self._new_pool()
            filling: Future[_Pool] = executor.submit(self._fill, memory, plan)
            for following in plans:
                pool = filling.result()
                if self.device.type == "cuda":  # copies from the previous pool must end before it is refilled
                    torch.cuda.current_stream(self.device).synchronize()
                memory, other = other, memory  # the previous pool is used up: its memory holds the next one
                filling = executor.submit(self._fill, memory, following)
                yield _Pool(pool.activations[plan.skip :], None if pool.scale is None else pool.scale[plan.skip :])
                plan = following

    def _new_pool(self) -> _Pool:
        example, scale = self.cache.activation_shard(self.hook, self.split, 0)
        pinned = self.device.type == "cuda"
        with torch.inference_mode(False):  # it is filled by another thread, outside the caller's mode
            pool = torch.empty(self.pool_tokens, self.d_in, dtype=example.dtype, pin_memory=pinned)
            return _Pool(pool, None if scale is None else torch.empty(self.pool_tokens, pin_memory=pinned))

    def _fill(self, memory: _Pool, plan: PoolPlan) -> _Pool:
        """Read blocks in the cache's order, and put each row directly in its place in the shuffled pool."""
        pool = memory.activations[: len(plan.places)]
        scales = None if memory.scale is None else memory.scale[: len(plan.places)]
        offset = 0
        with self.cache.checking(self.hook, self.split) as begin:
            checks = {number: begin(number) for number in self.order.shards_of(plan)}
            for number, check in checks.items():
                check.result()
                activations, scale = self.cache.activation_shard(self.hook, self.split, number)
                rows = self.order.rows_of(plan, number)
                places = plan.places[offset : offset + len(rows)]
                pool.index_copy_(0, places, activations.index_select(0, rows))
                if scales is not None and scale is not None:
                    scales.index_copy_(0, places, scale[rows])
                offset += len(rows)
        return _Pool(pool, scales)
