"""Batches without activations on disk: a language model fills the pool that training reads, in a cache's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.metadata import dictionary_metadata
from sae.activations.order import PoolPlan, ShuffledSource, TokenOrder
from sae.activations.shards import not_finite
from sae.activations.tokens import TokenStore
from sae.config.progress import StageProgress
from sae.errors import CacheError, ConfigError, TrainingInterrupted
from sae.numerics.modes import in_own_modes
from sae.numerics.statistics import Statistics

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel

_KEPT_BATCHES = 64
Pool = dict[str, Tensor]
"""Activations `[pool_tokens, d_in]` by hook point, in the number type of the cache."""


class _Work:
    """The filling of a pool, done in steps so that it keeps pace with the use of another.

    Args:
        steps: what is done in each step.
        count: number of steps, at least about.
    """

    def __init__(self, steps: Iterator[None], count: int) -> None:
        self._steps, self._count, self._done = steps, count, 0

    def advance(self, share: float) -> None:
        """Do this share of the steps, counted from the first; 1: all."""
        while share >= 1 or self._done < share * self._count:
            if next(self._steps, self) is self:
                return
            self._done += 1


class LivePass:
    """Passes of a language model over a store's training tokens, which feed the sources of one or more hook points.

    The order is that of a `TokenOrder` whose blocks are contexts: an epoch permutes the contexts of the whole text,
    gathers them into pools of about `pool_tokens` tokens, and permutes the tokens of each pool. Every eligible token is
    used exactly once per epoch, held-out documents never. One pass of the model gives the activations at all hook
    points. They are rounded to the cache's number type (bfloat16 for int8), so that training sees what it would read
    from a cache. The pool lies on `device`. If the model has a device of its own, it fills a second pool, a few
    contexts per batch, while the first is used.

    Sources of one pass are read side by side, batch by batch. A source that falls far behind the others gets passes of
    the model for itself.

    Args:
        cache: a cache for live training (`harvest.live`), or any other; its tokens are read, and its statistics are
            those of the sources.
        language_model: the model that the cache is of (see `check_same_model`).
        hooks: hook points of the cache.
        batch_size: rows per batch.
        seed: seed of the shuffle.
        purpose: purpose of the shuffle; orders for different purposes are independent, whatever their seeds.
        pool_tokens: tokens shuffled together, at least a context.
        batch_contexts: contexts per forward pass of the model.
        device: device of the pool and of the batches.
        progress: called with (tokens in the pool that is being filled, tokens it will have).

    Raises:
        CacheError: a hook point is not in the cache, or no token is eligible.
        ConfigError: a pool holds less than a context.

    Attributes:
        sources: the sources by hook point.
    """

    def __init__(
        self,
        cache: ActivationCache,
        language_model: LanguageModel,
        hooks: Sequence[str],
        *,
        batch_size: int,
        seed: int = 0,
        purpose: str = "training",
        pool_tokens: int = 262_144,
        batch_contexts: int = 32,
        device: str | torch.device = "cpu",
        progress: StageProgress | None = None,
    ) -> None:
        self.progress = progress
        self.cache, self.language_model, self.hooks = cache, language_model, tuple(dict.fromkeys(hooks))
        self.store, self.device = TokenStore(cache.path), torch.device(device)
        self.batch_size, self.batch_contexts = batch_size, batch_contexts
        length = self.store.context_length
        if pool_tokens < length:
            raise ConfigError(f"train.pool_tokens={pool_tokens}: less than a context of {length} tokens; raise it")
        self.order = TokenOrder(
            self.store, seed=seed, purpose=purpose, pool_tokens=pool_tokens, block_tokens=length
        )  # fmt: skip
        self.stopped: Callable[[], bool] = lambda: False
        self._waiting: dict[str, deque[tuple[tuple[int, int], Tensor]]] = {}
        self._batches: Iterator[dict[str, Tensor]] = iter(())
        self._place: tuple[int, int] | None = None
        self.sources = {hook: LiveSource(self, hook) for hook in self.hooks}

    @property
    def prefetches(self) -> bool:
        """Whether the model fills a second pool while the first is used: if it has a device of its own."""
        return self.language_model.device != self.device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the pool."""
        dtype = self.cache.stored_dtype
        return torch.bfloat16 if dtype == torch.int8 else dtype

    def pool_bytes(self, hook: str) -> int:
        """Memory of a hook point's pool, or of both pools, in bytes."""
        return (2 if self.prefetches else 1) * self.order.pool_tokens * self.cache.d_in(hook) * self.dtype.itemsize

    @in_own_modes
    def batch(self, hook: str, position: int, streams: int) -> Float[Tensor, "batch d_in"]:
        """The batch of a hook point that begins at a position of the order, in the pool's number type.

        Raises:
            CacheError: activations are not finite.
            TrainingInterrupted: `stopped` says so while the model fills the pool.
        """
        place = position, streams
        waiting = self._waiting.get(hook)
        while waiting and waiting[0][0] != place:
            waiting.popleft()
        if waiting:
            return waiting.popleft()[1]
        if self._place != place:
            self._waiting = {name: deque(maxlen=_KEPT_BATCHES) for name in self.hooks}
            self._batches, self._place = self._joint_batches(*place), place
        try:
            batch = next(self._batches)
        except BaseException:
            self._place = None  # the generator has ended: the next call starts another
            raise
        for name in self.hooks:
            if name != hook:
                self._waiting[name].append((place, batch[name]))
        self._place = position + self.batch_size, streams
        return batch[hook]

    def _joint_batches(self, position: int, streams: int) -> Iterator[dict[str, Tensor]]:
        parts: list[Pool] = []
        missing = self.batch_size
        for pool, plan, work in self._pools(position, streams):
            start, rows = plan.skip, len(plan.places)
            while start < rows:
                stop = min(start + missing, rows)
                parts.append({hook: x[start:stop].clone() for hook, x in pool.items()})  # the pool is filled again
                missing -= stop - start
                start = stop
                if missing == 0:
                    yield {hook: torch.cat([part[hook] for part in parts]) for hook in self.hooks}
                    parts, missing = [], self.batch_size
                    work.advance((start - plan.skip) / (rows - plan.skip))

    def _pools(self, position: int, streams: int) -> Iterator[tuple[Pool, PoolPlan, _Work]]:
        """Pools from a position on, each with its plan, and with work to do while it is used."""
        plans = self.order.plans(position, streams)
        pool, plan = self._new_pool(), next(plans)
        other = self._new_pool() if self.prefetches else pool
        work = self._work(pool, plan)
        for following in plans:
            work.advance(1.0)
            next_work = self._work(other, following)
            yield pool, plan, next_work if self.prefetches else _Work(iter(()), 0)
            pool, other, plan, work = other, pool, following, next_work

    def _new_pool(self) -> Pool:
        with torch.inference_mode(False):
            return {
                hook: torch.empty(self.order.pool_tokens, self.cache.d_in(hook), dtype=self.dtype, device=self.device)
                for hook in self.hooks
            }

    def _work(self, pool: Pool, plan: PoolPlan) -> _Work:
        return _Work(self._fill(pool, plan), -(-len(plan.blocks) // self.batch_contexts))

    def _fill(self, pool: Pool, plan: PoolPlan) -> Iterator[None]:
        """Run the model over the plan's contexts, and put each eligible token's activations in its place.

        Always whole pools, so that the model's batches, and with them the last bits of the activations, do not depend
        on where training was interrupted.
        """
        places, filled = plan.places.to(self.device), 0
        finite = {hook: torch.ones((), dtype=torch.bool, device=self.device) for hook in self.hooks}
        for tokens, rows in self.contexts(plan):
            if self.stopped():
                raise TrainingInterrupted("stopped while the language model filled the pool")
            activations = self.language_model.activations(tokens.to(self.language_model.device), self.hooks)
            there, filled = places[filled : filled + len(rows)], filled + len(rows)
            for hook, x in activations.items():
                chosen = x.flatten(0, 1).index_select(0, rows.to(x.device)).to(self.device, self.dtype)
                pool[hook].index_copy_(0, there, chosen)
                finite[hook] &= chosen.isfinite().all()
            if self.progress is not None:
                self.progress(filled, len(places))
            yield
        for hook, is_finite in finite.items():
            if not bool(is_finite):
                is_nan = bool(pool[hook][: len(places)].isnan().any())
                raise CacheError(not_finite(hook, self.cache.manifest, is_nan))

    def contexts(self, plan: PoolPlan) -> Iterator[tuple[Int[Tensor, "context seq"], Int[Tensor, " rows"]]]:
        """Tokens of a few contexts, and which of them, counted through the batch, are eligible; in text order."""
        length, split = self.store.context_length, self.order.split
        contexts: list[Tensor] = []
        eligible: list[Tensor] = []
        for shard, needed in self.order.reads(plan):
            tokens, rows = self.store.token_columns(split, shard)["tokens"].long(), torch.from_numpy(needed)
            for number in (rows // length).unique().tolist():
                context = tokens[number * length : (number + 1) * length]
                if contexts and (len(contexts) == self.batch_contexts or len(context) != len(contexts[0])):
                    yield torch.stack(contexts), torch.cat(eligible)
                    contexts, eligible = [], []
                first, last = torch.searchsorted(rows, torch.tensor([number * length, (number + 1) * length])).tolist()
                eligible.append(rows[first:last] - number * length + len(contexts) * length)
                contexts.append(context)
        if contexts:
            yield torch.stack(contexts), torch.cat(eligible)


class LiveSource(ShuffledSource):
    """Endless batches `[batch_size, d_in]` of one hook point from a `LivePass`, in the number type of its pool.

    Resumed from a state, it makes the model's pass over the current pool again, and continues exactly there: with the
    same bits on a CPU with the same number of threads.
    """

    def __init__(self, live: LivePass, hook: str) -> None:
        super().__init__(live.order, live.batch_size)
        self.live, self.hook, self.d_in = live, hook, live.cache.d_in(hook)

    @property
    def statistics(self) -> Statistics:
        """Mean and mean squared norm of the cache's stored training activations, fixed before the first step."""
        return self.live.cache.statistics(self.hook)

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata for a dictionary trained on these activations: model, hook point, token policy and text."""
        return dictionary_metadata(self.live.cache, self.hook)

    @property
    def pool_bytes(self) -> int:
        """Memory of this hook point's pool, or of both pools, in bytes."""
        return self.live.pool_bytes(self.hook)

    def stop_when(self, stopped: Callable[[], bool]) -> None:
        """Ask `stopped` between batches of the model, and raise TrainingInterrupted when it says so."""
        self.live.stopped = stopped

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        while True:
            batch = self.live.batch(self.hook, self.position, self.streams)
            self.position += self.batch_size
            yield batch
