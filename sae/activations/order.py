"""The order in which training reads tokens: every eligible one once per epoch, in pools from all over the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sae.activations.tokens import TokenStore
from sae.config.splits import TRAIN
from sae.errors import CacheError
from sae.numerics.seeding import STREAMS, loader_generator_1, numpy_generator


@dataclass(frozen=True)
class PoolPlan:
    """The rows of a pool.

    Attributes:
        blocks: numbers of its blocks, ascending.
        places: the place in the pool of each eligible row of these blocks, in text order.
        skip: number of rows at its start that have been used already.
    """

    blocks: Int[np.ndarray, " blocks"]
    places: Int[Tensor, " rows"]
    skip: int


class TokenOrder:
    """A shuffled order of a store's eligible tokens, the same whenever it is made with the same arguments.

    The store is cut into blocks of consecutive rows. An epoch permutes the blocks, gathers them into pools of about
    `pool_tokens` rows, and permutes the rows of each pool. One byte per row of the store is kept: whether it is
    eligible.

    Args:
        store: holds the tokens.
        seed: seed of the shuffle.
        purpose: purpose of the shuffle; orders for different purposes are independent, whatever their seeds.
        pool_tokens: rows shuffled together.
        block_tokens: consecutive rows read together.
        split: the split that is read.

    Raises:
        CacheError: no token is eligible.

    Attributes:
        tokens_per_epoch: number of eligible tokens.
        pool_tokens: largest number of rows in a pool; fewer than asked for if an epoch has fewer.
    """

    def __init__(
        self, store: TokenStore, *, seed: int, purpose: str, pool_tokens: int, block_tokens: int, split: str = TRAIN
    ) -> None:
        self.store, self.seed, self.purpose, self.split = store, seed, purpose, split
        self.block_tokens = min(block_tokens, pool_tokens)
        with store.checking("tokens", split) as begin:
            checks = [begin(number) for number in range(store.shards(split))]
            self._eligible_rows = [store.eligible_shard(split, n) for n, check in enumerate(checks) if check.result()]
        self._shard, self._start, self._eligible = self._find_blocks()
        self.tokens_per_epoch = int(self._eligible.sum())
        if self.tokens_per_epoch == 0:
            raise CacheError(
                f"cache {str(store.path)!r}: all {store.rows(split):,} tokens are masked; nothing to train on"
            )
        self.pool_tokens = min(pool_tokens, self.tokens_per_epoch)

    def signature(self, streams: int) -> tuple[object, ...]:
        """Everything that determines the order, given the text."""
        return (
            self.split, self.seed, self.purpose, streams, self.tokens_per_epoch, self.pool_tokens, self.block_tokens,
        )  # fmt: skip

    def plans(self, position: int, streams: int) -> Iterator[PoolPlan]:
        """Pools from a position on, epoch after epoch; the first may begin before it."""
        epoch, offset = divmod(position, self.tokens_per_epoch)
        while True:
            blocks = self._generator(streams, epoch, 0).permutation(len(self._eligible))
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
                places = self._generator(streams, epoch, number + 1).permutation(rows)
                yield PoolPlan(np.sort(blocks[first:last]), torch.from_numpy(places), max(offset - before, 0))
            epoch, offset = epoch + 1, 0

    def shards_of(self, plan: PoolPlan) -> list[int]:
        """The shards that a pool needs."""
        return np.unique(self._shard[plan.blocks]).tolist()

    def reads(self, plan: PoolPlan) -> Iterator[tuple[int, Int[np.ndarray, " rows"]]]:
        """The shards that a pool needs, and the eligible rows that it needs within each; both ascending."""
        shards, firsts = np.unique(self._shard[plan.blocks], return_index=True)
        in_block = np.arange(self.block_tokens)
        for number, blocks in zip(shards.tolist(), np.split(plan.blocks, firsts[1:]), strict=True):
            eligible = self._eligible_rows[number].numpy()
            rows = (self._start[blocks][:, None] + in_block).ravel()
            rows = rows[: np.searchsorted(rows, len(eligible))]
            yield number, rows[eligible[rows]]

    def _generator(self, streams: int, epoch: int, number: int) -> np.random.Generator:
        """Generator for an epoch's blocks (number 0), or for the rows of one of its pools (numbers 1, 2, …)."""
        if streams == 1:
            return loader_generator_1(self.seed, epoch, number)
        return numpy_generator(f"order of tokens: {self.purpose}", self.seed, epoch, number)

    def _find_blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, first row within it, and number of eligible rows of every block."""
        shards, starts, counts = [], [], []
        for number, eligible in enumerate(self._eligible_rows):
            first = np.arange(0, len(eligible), self.block_tokens)
            shards.append(np.full(len(first), number))
            starts.append(first)
            counts.append(np.add.reduceat(eligible.numpy(), first, dtype=np.int64))
        return np.concatenate(shards), np.concatenate(starts), np.concatenate(counts)


class ShuffledSource:
    """A training source that reads a store's tokens in a shuffled order, and knows its place in it.

    The state consists of the rows consumed so far and the version of the random streams; a source of the same order
    with that state continues exactly there.
    """

    def __init__(self, order: TokenOrder, batch_size: int) -> None:
        self.order, self.batch_size = order, batch_size
        self.position, self.streams = 0, STREAMS

    @property
    def tokens_per_epoch(self) -> int:
        """Number of eligible tokens."""
        return self.order.tokens_per_epoch

    @property
    def pool_tokens(self) -> int:
        """Rows shuffled together."""
        return self.order.pool_tokens

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
        """Hash of the store's text, and the path of the store."""
        return self.order.store.manifest.text_sha256, str(self.order.store.path)

    @property
    def token_order(self) -> tuple[object, ...]:
        """Everything that determines the order of tokens; sources read side by side must have the same."""
        return self.order.signature(self.streams)
