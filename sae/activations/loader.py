"""Shuffled batches from a cache: every eligible token once per epoch, in an order set by seed and position."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.metadata import dictionary_metadata
from sae.activations.order import ShuffledSource, TokenOrder
from sae.activations.pools import DevicePools, HostPools, Pools
from sae.config.splits import TRAIN
from sae.numerics.statistics import Statistics
from sae.numerics.transfer import Transfer


class ActivationLoader(ShuffledSource):
    """Endless batches `[batch_size, d_in]` of activations, shuffled over tokens.

    Batches have the type that the cache stores, such as bfloat16; only int8 is converted, to float32. `train` and the
    methods of dictionaries convert what they are given, and `batch.float()` does it elsewhere.

    The order is that of a `TokenOrder`: pools of about `pool_tokens` rows from all over the cache. The next pool is
    read while the current one is used, so `pool_bytes` counts two. On a GPU, pools lie in its memory; on a CPU in the
    page cache, from which the system takes memory back when it is needed elsewhere.

    Args:
        cache: the cache that holds the activations.
        hook: hook point.
        batch_size: rows per batch.
        seed: seed of the shuffle.
        purpose: purpose of the shuffle; orders for different purposes are independent, whatever their seeds.
        pool_tokens: rows shuffled together.
        block_tokens: consecutive rows read together; smaller mixes more finely, larger reads faster.
        device: device of the pools and the batches; the order is the same on every device.

    Raises:
        CacheError: the hook point is not in the cache, or no token is eligible. While iterating: a shard cannot be
            read.
        DamagedError: (a CacheError) while iterating: a shard differs from its hash. None of its rows was given before.
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
        """Memory of both pools, in bytes: of the loader's device, or of the page cache if that is the CPU."""
        scale_bytes = 4 if self.cache.stored_dtype == torch.int8 else 0
        return 2 * self.pool_tokens * (self.d_in * self.cache.stored_dtype.itemsize + scale_bytes)

    def __iter__(self) -> Iterator[Shaped[Tensor, "batch d_in"]]:
        batch_size = self.batch_size
        plans = self.order.plans(self.position, self.streams)
        with contextlib.closing(self._pools().batches(plans, batch_size)) as batches:
            for batch in batches:
                self.position += batch_size
                yield batch

    def _pools(self) -> Pools:
        if self.device.type == "cpu":
            return HostPools(self.cache, self.hook, self.order)
        return DevicePools(self.cache, self.hook, self.order, Transfer(self.device))
