from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.activations.loader import ActivationLoader
from sae.errors import CacheError
from sae.numerics.seeding import numpy_generator

HOOK = "blocks.0.hook_resid_pre"
CONTEXT = 8


@pytest.fixture
def marked(write_cache: Callable[..., ActivationCache]) -> tuple[ActivationCache, list[int]]:
    """A cache whose activations are the numbers of their rows, and the rows that count."""
    return mark_rows(write_cache, 1003)


def mark_rows(
    write_cache: Callable[..., ActivationCache], rows: int, **options: Any
) -> tuple[ActivationCache, list[int]]:
    tokens = torch.randint(0, 5, (rows,), generator=torch.Generator().manual_seed(0))
    x = torch.arange(rows).float()[:, None].expand(rows, 3)
    cache = write_cache(x, tokens, context_length=CONTEXT, **options)
    return cache, [row for row in range(rows) if row % CONTEXT and tokens[row] != 0]


def drawn(loader: ActivationLoader, batches: int) -> list[int]:
    """Row numbers in the order in which they come."""
    taken = list(itertools.islice(loader, batches))
    for batch in taken:
        assert batch.shape == (loader.batch_size, loader.d_in)
        assert batch.dtype == loader.cache.stored_dtype
    x = torch.cat([torch.empty(0, loader.d_in), *taken])
    assert (x == x[:, :1]).all()
    return x[:, 0].long().tolist()


@pytest.mark.parametrize("block_tokens", [1, 5, 64, 5000])
@pytest.mark.parametrize("pool_tokens", [pytest.param(1, marks=pytest.mark.slow), 50, 333, 10**6])
def test_every_eligible_row_once_an_epoch_and_no_other(
    marked: tuple[ActivationCache, list[int]], pool_tokens: int, block_tokens: int
) -> None:
    cache, eligible = marked
    loader = ActivationLoader(cache, HOOK, batch_size=7, pool_tokens=pool_tokens, block_tokens=block_tokens, seed=3)
    assert loader.tokens_per_epoch == len(eligible)
    rows = drawn(loader, -(-3 * len(eligible) // 7))
    epochs = [rows[start : start + len(eligible)] for start in range(0, 3 * len(eligible), len(eligible))]
    for epoch in epochs:
        assert sorted(epoch) == eligible
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_can_be_larger_than_pool_and_epoch(marked: tuple[ActivationCache, list[int]]) -> None:
    cache, eligible = marked
    loader = ActivationLoader(cache, HOOK, batch_size=2 * len(eligible) + 5, pool_tokens=64)
    rows = drawn(loader, 1)
    assert sorted(rows[: len(eligible)]) == sorted(rows[len(eligible) : -5]) == eligible
    assert loader.state_dict() == {"position": 2 * len(eligible) + 5, "streams": 2}


def test_order_is_a_function_of_the_seed(marked: tuple[ActivationCache, list[int]]) -> None:
    cache, _ = marked
    first, again, other = (
        drawn(ActivationLoader(cache, HOOK, batch_size=10, pool_tokens=100, seed=seed), 40) for seed in (0, 0, 1)
    )
    assert first == again
    agreement = sum(a == b for a, b in zip(first, other, strict=True))
    assert agreement < 10  # by chance one in about seven hundred


@pytest.mark.parametrize("batches", [0, 1, 9, 70, 71, 200])
@pytest.mark.parametrize("pool_tokens", [100, 10**6])
def test_a_loader_goes_on_from_any_position(
    marked: tuple[ActivationCache, list[int]], batches: int, pool_tokens: int
) -> None:
    cache, _ = marked
    make = lambda: ActivationLoader(cache, HOOK, batch_size=10, pool_tokens=pool_tokens, seed=5)  # noqa: E731
    whole = drawn(make(), batches + 30)
    before = make()
    used = drawn(before, batches)
    after = make()
    after.load_state_dict(before.state_dict())
    assert used + drawn(after, 30) == whole
    assert after.state_dict() == {"position": 10 * (batches + 30), "streams": 2}
    assert drawn(before, 30) == whole[10 * batches :]  # the same object iterated anew goes on as well


def slow_order(
    eligible: list[int], rows: int, pool_tokens: int, block_tokens: int, generator: Callable[[int, int], Any]
) -> list[int]:
    """Two epochs in plain Python; `generator` is of an epoch's blocks (number 0), or of one of its pools."""
    counts, order, shard_rows = set(eligible), [], 4 * CONTEXT
    blocks = [
        [row for row in range(start, min(start + block_tokens, first + shard_rows, rows)) if row in counts]
        for first in range(0, rows, shard_rows)
        for start in range(first, min(first + shard_rows, rows), block_tokens)
    ]
    for epoch in range(2):
        pools: list[list[int]] = []
        size = pool_tokens
        for block in generator(epoch, 0).permutation(len(blocks)).tolist():
            if not pools or size + len(blocks[block]) > pool_tokens:
                pools, size = [*pools, []], 0
            pools[-1].append(block)
            size += len(blocks[block])
        for number, pool in enumerate(pools):
            held = [row for block in sorted(pool) for row in blocks[block]]
            places = generator(epoch, number + 1).permutation(len(held)).tolist()
            order += [row for _, row in sorted(zip(places, held, strict=True))]
    return order


@pytest.mark.parametrize(("streams", "state"), [(1, {"position": 0}), (2, {"position": 0, "streams": 2})])
@pytest.mark.parametrize(("pool_tokens", "block_tokens"), [(100, 8), (333, 5), (10**6, 64)])
def test_a_state_without_a_version_goes_on_in_the_order_it_was_begun_with(
    marked: tuple[ActivationCache, list[int]], streams: int, state: dict[str, int], pool_tokens: int, block_tokens: int
) -> None:
    """Before streams had versions, these were `np.random.default_rng([seed, epoch, number])`."""
    cache, eligible = marked

    def generator(epoch: int, number: int) -> np.random.Generator:
        if streams == 1:
            return np.random.default_rng([3, epoch, number])
        return numpy_generator("order of tokens: training", 3, epoch, number)

    expected = slow_order(eligible, 1003, min(pool_tokens, len(eligible)), block_tokens, generator)
    make = lambda: ActivationLoader(  # noqa: E731
        cache, HOOK, batch_size=10, seed=3, pool_tokens=pool_tokens, block_tokens=block_tokens
    )
    batches = len(expected) // 10
    loader = make()
    loader.load_state_dict(state)
    assert drawn(loader, batches) == expected[: 10 * batches]
    resumed = make()
    resumed.load_state_dict({**state, "position": 470})
    assert drawn(resumed, 20) == expected[470:670]
    assert resumed.state_dict() == {"position": 670, "streams": streams}
    resumed.restart()
    assert resumed.state_dict() == {"position": 0, "streams": 2}, "what begins anew begins in today's order"


def test_an_order_that_is_not_known_is_refused(marked: tuple[ActivationCache, list[int]]) -> None:
    loader = ActivationLoader(marked[0], HOOK, batch_size=10)
    with pytest.raises(
        CacheError, match=r"state has streams=3, but this version knows 1 to 2: continue with the version of"
    ):
        loader.load_state_dict({"position": 0, "streams": 3})


def test_orders_for_two_purposes_have_nothing_in_common(marked: tuple[ActivationCache, list[int]]) -> None:
    one, other = (
        drawn(ActivationLoader(marked[0], HOOK, batch_size=10, **purpose), 40)
        for purpose in ({}, {"purpose": "frozen decoder"})
    )
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


def test_neighbours_in_a_batch_are_not_neighbours_in_the_text(write_cache: Callable[..., ActivationCache]) -> None:
    """Rows of consecutive batch elements: uncorrelated, and seldom from one context, with a pool of 1/10 of the cache.

    The correlation of n independent pairs has a standard error of 1/√n. Two rows of one pool are in the same context
    with probability ~ (7 − 1)/pool rows if whole blocks of 16 rows are read.
    """
    cache, eligible = mark_rows(write_cache, 40_000, shard_contexts=512)
    loader = ActivationLoader(cache, HOOK, batch_size=100, pool_tokens=len(eligible) // 10, block_tokens=16, seed=1)
    rows = np.array(drawn(loader, len(eligible) // 100))
    n = len(rows)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 4 / n**0.5
    same_context = (rows[:-1] // CONTEXT == rows[1:] // CONTEXT).mean()
    assert same_context < 3 * CONTEXT / loader.pool_tokens
    # the first pool alone covers the cache evenly: quantiles of its rows are those of all rows
    pool = np.sort(rows[: loader.pool_tokens])
    expected = np.quantile(eligible, [0.1, 0.25, 0.5, 0.75, 0.9])
    blocks = loader.pool_tokens / 12
    assert np.abs(np.quantile(pool, [0.1, 0.25, 0.5, 0.75, 0.9]) - expected).max() < 4 * 40_000 * 0.5 / blocks**0.5


def test_int8_is_multiplied_by_its_tokens_scale(write_cache: Callable[..., ActivationCache]) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-127, 128, (400, 5), generator=generator, dtype=torch.int8)
    scale = torch.rand(400, generator=generator) + 0.1
    cache = write_cache(stored, torch.arange(400) + 1, scale=scale, masked_ids=(), masked_positions=0)
    loader = ActivationLoader(cache, HOOK, batch_size=400, pool_tokens=64)
    expected = stored.numpy().astype(np.float32) * scale.numpy()[:, None]
    ours = next(iter(loader)).numpy()
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, expected.tolist()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_as_it_is_stored(write_cache: Callable[..., ActivationCache], dtype: torch.dtype) -> None:
    stored = torch.randn(64, 5).to(dtype)
    cache = write_cache(stored, torch.arange(64), masked_ids=(), masked_positions=0)
    ours = next(iter(ActivationLoader(cache, HOOK, batch_size=64)))
    assert ours.dtype == dtype
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, stored.double().tolist()))


def test_batches_may_be_changed_in_place(marked: tuple[ActivationCache, list[int]]) -> None:
    cache, _ = marked
    changed, untouched = (ActivationLoader(cache, HOOK, batch_size=50, pool_tokens=10**6) for _ in range(2))
    for batch, expected in itertools.islice(zip(changed, untouched, strict=True), 60):
        assert torch.equal(batch, expected)
        batch.fill_(-1)


def test_held_batches_are_not_overwritten_by_later_pools(marked: tuple[ActivationCache, list[int]]) -> None:
    cache, _ = marked
    taken: list[Tensor] = []
    copies: list[Tensor] = []
    for batch in itertools.islice(ActivationLoader(cache, HOOK, batch_size=10, pool_tokens=30), 50):
        taken.append(batch)
        copies.append(batch.clone())
    assert torch.equal(torch.cat(taken), torch.cat(copies))


def test_harvested_cache_is_loaded_as_it_is(tiny_cache: ActivationCache) -> None:
    hook = tiny_cache.hooks[1]
    loader = ActivationLoader(tiny_cache, hook, batch_size=1, split="held_out")
    expected = torch.cat([batch.activations[batch.eligible] for batch in tiny_cache.contexts("held_out", hook)])
    assert loader.tokens_per_epoch == len(expected)
    ours = torch.cat(list(itertools.islice(loader, len(expected))))
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, expected.tolist()))


def test_nothing_to_load_is_an_error(write_cache: Callable[..., ActivationCache]) -> None:
    cache = write_cache(torch.ones(20, 3), torch.zeros(20))
    with pytest.raises(CacheError, match=r"all 20 tokens are masked; nothing to train on"):
        ActivationLoader(cache, HOOK, batch_size=4)
    with pytest.raises(
        CacheError, match=r"hook 'blocks.5.hook_resid_pre' is not in it; it holds blocks.0.hook_resid_pre"
    ):
        ActivationLoader(cache, "blocks.5.hook_resid_pre", batch_size=4)


def test_a_shard_lost_while_loading_is_named(marked: tuple[ActivationCache, list[int]]) -> None:
    cache, _ = marked
    loader = ActivationLoader(cache, HOOK, batch_size=10, pool_tokens=100)
    (cache.path / HOOK / "train-00003.safetensors").unlink()
    with pytest.raises(CacheError, match=r"blocks.0.hook_resid_pre/train-00003.safetensors': missing; .*restore it"):
        drawn(loader, 100)


def test_a_reader_left_in_the_middle_waits_for_no_thread(
    tiny_cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector may end it while a thread is being started, where waiting for another would never end."""

    def join(*_: object) -> None:
        raise AssertionError("waits for a thread")

    hook = tiny_cache.hooks[0]
    readers = [
        iter(ActivationLoader(tiny_cache, hook, batch_size=64, pool_tokens=128)),
        tiny_cache.contexts("train", hook, batch_contexts=1),
    ]
    for reader in readers:
        next(reader)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "join", join)
            reader.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_readers_that_a_program_ends_with_say_nothing(tiny_cache: ActivationCache) -> None:
    code = (
        "import sys, sae\ncache = sae.ActivationCache(sys.argv[1])\n"
        "reader = iter(sae.ActivationLoader(cache, cache.hooks[0], batch_size=64, pool_tokens=128))\n"
        "contexts = cache.contexts('train', cache.hooks[0], batch_contexts=1)\nnext(reader), next(contexts)\n"
    )
    command = [sys.executable, "-c", code, str(tiny_cache.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
