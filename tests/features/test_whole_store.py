"""Whole stores, compared with a reference that enumerates every firing in plain Python."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.architectures import TopK
from sae.features import Features
from sae.features.collector import Collector
from sae.features.examples import reservoir_size
from sae.features.groups import ExampleGroups
from sae.features.keys import random_keys
from sae.features.scan import scan_contexts
from sae.numerics import seeding
from tests.support.fake_cache import HOOK
from tests.support.feature_case import CONTEXT, D_SAE, SETTINGS, Case, build_case
from tests.support.feature_reference import random_key

SEED = 3


@pytest.fixture(scope="module")
def long_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Features fire up to ten times as often as their reservoirs hold."""
    return build_case(tmp_path_factory.mktemp("long") / "activations", rows=1507, document_length=31)


def check(store: Features, case: Case) -> None:
    """Every example, count and histogram is that of the reference."""
    reference, scale = case.reference, case.cache.statistics(HOOK).mean_squared_norm ** 0.5
    key = partial(random_key, seeding.number("features: examples", SEED))
    most, edges = reservoir_size(SETTINGS), np.array(store.info["histogram_edges"])
    for feature in store:
        firings = reference.firings(feature.index)
        values = [firing.value for firing in firings]
        top = reference.top(feature.index, SETTINGS.top)
        assert [(example.value, example.row) for example in feature.top] == [(f.value, f.row) for f in top]
        shown = [[example.row for example in group] for group in feature.quantiles]
        assert shown == reference.sampled_quantiles(
            feature.index, SETTINGS.quantiles, SETTINGS.per_quantile, most, scale, key
        )
        for example in [*feature.top, *(example for group in feature.quantiles for example in group)]:
            rows = reference.window_rows(example.row, SETTINGS.before, SETTINGS.after)
            assert example.activations == [reference.activation(row, feature.index) for row in rows]
        counts = [count for count in np.histogram(values, edges)[0].tolist() if count]
        assert [count for count in feature.histogram.counts if count] == counts
        assert (feature.count, feature.max) == (len(values), max(values, default=0))
        assert feature.mean == np.float32(sum(values) / max(1, len(values)))


@pytest.mark.parametrize("batch_contexts", [None, 1, 11])
@pytest.mark.parametrize("tight", [False, True])
def test_a_store_is_what_enumerating_all_firings_gives(
    long_case: Case, tmp_path: Path, batch_contexts: int | None, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the buffer of firings is small, and the windows' grid holds few features."""
    firings = len(long_case.reference.firings(0))
    assert firings > 5 * reservoir_size(SETTINGS)
    if tight:
        monkeypatch.setattr("sae.features.collector.ROOM", 1)
        monkeypatch.setattr("sae.features.windows.GRID_NUMBERS", 1500)
        monkeypatch.setattr("sae.features.examples._PICKED_AT_ONCE", 100)
        monkeypatch.setattr("sae.features.best._MOVED_AT_ONCE", 10)
    check(long_case.collect(tmp_path / "store", seed=SEED, batch_contexts=batch_contexts), long_case)


@pytest.mark.parametrize("tight", [False, True])
def test_the_steps_of_a_gpu_collect_the_same_store(
    long_case: Case, tmp_path: Path, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates are kept one batch later, and nothing is sorted by NumPy."""
    if tight:
        monkeypatch.setattr("sae.features.collector.ROOM", 1)
    monkeypatch.setattr("sae.features.collector._batches_behind", lambda _: 1)
    monkeypatch.setattr("sae.features.ordering._is_numpys", lambda _: False)
    check(long_case.collect(tmp_path / "store", seed=SEED, batch_contexts=5), long_case)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_collects_the_same_store(long_case: Case, tmp_path: Path) -> None:
    check(long_case.collect(tmp_path / "store", seed=SEED, device="cuda", batch_contexts=11), long_case)
    dictionary = TopK(D_SAE, D_SAE, k=3)
    dictionary.load_state_dict(long_case.dictionary.state_dict())
    case = replace(long_case, dictionary=dictionary)
    stores = [case.collect(tmp_path / device, device=device, batch_contexts=11) for device in ("cpu", "cuda")]
    assert list(stores[0]) == list(stores[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_not_waited_for(long_case: Case) -> None:
    """Up to the first selection from a full buffer."""
    dictionary, groups = TopK(D_SAE, D_SAE, k=3).cuda(), ExampleGroups.of(long_case.cache, SETTINGS)
    dictionary.load_state_dict(long_case.dictionary.state_dict())
    collector = Collector(D_SAE, SETTINGS, CONTEXT, 1.0, SEED, groups, rows=1507, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for fired in scan_contexts(dictionary, long_case.cache, "train", HOOK, batch_contexts=11):
            collector.add(fired)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert collector.finish().tokens == long_case.reference.tokens


@pytest.mark.parametrize("seed", [0, 1, 2, 12345, (1 << 32) - 1])
def test_keys_of_firings_are_arithmetic_modulo_powers_of_two(seed: int) -> None:
    row, feature = torch.tensor([0, 7, 1 << 33]), torch.tensor([3, 1, 24_575])
    number = seeding.number("some purpose", seed)
    expected = [random_key(number, r, f) for r, f in zip(row.tolist(), feature.tolist(), strict=True)]
    assert (random_keys(feature, row, "some purpose", seed).long() + (1 << 31)).tolist() == expected
    assert random_keys(feature.int(), row, "some purpose", seed).dtype == torch.int32
