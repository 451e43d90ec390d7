"""Rules that select firings, compared with sorting all firings in plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from sae.features.best import Kept, Lowest, strength_keys
from sae.features.ordering import lowest_in_runs, place_in_run, places_of, run_starts, stable_order, stable_sort


@dataclass(frozen=True)
class Firings:
    """Firings in the order of their rows; keys and values repeat if `kinds` is small."""

    feature: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    group: torch.Tensor

    def parts(self, size: int) -> Iterator[slice]:
        for start in range(0, len(self.feature), size):
            yield slice(start, start + size)


def random_firings(n: int, features: int, kinds: int, seed: int) -> Firings:
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randint(0, features, (n,), generator=generator, dtype=torch.int32)
    least, most = -(1 << 31), (1 << 31) - 1
    keys = torch.cat([torch.tensor([least, most]), torch.randint(least, most, (kinds,), generator=generator)]).int()
    values = torch.rand(kinds, generator=generator) + 0.1
    drawn = torch.randint(0, kinds, (2, n), generator=generator)
    return Firings(feature, keys[drawn[0]], values[drawn[1]], torch.arange(n) // 7)


def slow_lowest(feature: list[int], key: list[int], n: int, group: list[int] | None = None) -> set[int]:
    """Places of the n lowest keys of each feature, the best of each group, the earlier of equal keys."""
    selected = set()
    for one in set(feature):
        seen: set[int] = set()
        for _, place in sorted((k, p) for p, (f, k) in enumerate(zip(feature, key, strict=True)) if f == one):
            number = place if group is None else group[place]
            if number not in seen and len(seen) < n:
                seen.add(number)
                selected.add(place)
    return selected


@pytest.mark.parametrize("kinds", [1, 3, 10_000])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("n", [1, 4, 1000])
def test_the_lowest_keys_are_selected(n: int, grouped: bool, kinds: int) -> None:
    firings = random_firings(600, 9, kinds, seed=kinds)
    rule = Lowest(10, n)
    selected = rule.select(firings.feature, firings.key, firings.group if grouped else None)
    group = firings.group.tolist() if grouped else None
    expected = slow_lowest(firings.feature.tolist(), firings.key.tolist(), n, group)
    assert set(selected.nonzero()[:, 0].tolist()) == expected
    full = torch.bincount(firings.feature[selected], minlength=10) == n
    for feature in range(10):
        worst = firings.key[selected & (firings.feature == feature)].max().item() if full[feature] else 1 << 31
        assert rule.limit[feature].item() == max(worst - 1, -(1 << 31)), feature
    assert rule.select(firings.feature[:0], firings.key[:0], firings.group[:0]).tolist() == []


@pytest.mark.parametrize("kinds", [2, 10_000])
@pytest.mark.parametrize("room", [1, 13, 5000])
def test_what_is_kept_of_a_stream_is_what_is_selected_at_once(room: int, kinds: int) -> None:
    firings = random_firings(2000, 6, kinds, seed=room)
    strongest, sample = Lowest(6, 3, worst=-2), Lowest(6, 5)
    kept = Kept(strongest, sample, width=1, room=room)
    for part in firings.parts(29):
        feature, key, value = firings.feature[part], firings.key[part], firings.value[part]
        strong = strength_keys(value) <= strongest.limit[feature.long()]
        sampled = key <= sample.limit[feature.long()]
        for number in (strong | sampled).nonzero()[:, 0].tolist():
            if not kept.room:
                kept.select()
                assert kept.room >= room
            place = kept.places(1).start
            kept.feature[place], kept.row[place] = feature[number], part.start + number
            kept.value[place], kept.key[place], kept.group[place] = (
                value[number],
                key[number],
                firings.group[part][number],
            )
            kept.is_strong[place], kept.is_sampled[place], kept.window[place] = strong[number], sampled[number], number
    kept.select()
    feature, row = firings.feature.tolist(), kept.row[: kept.count]
    expected_strong = slow_lowest(feature, (-firings.value.double()).tolist(), 3, firings.group.tolist())
    expected_sample = slow_lowest(feature, firings.key.tolist(), 5)
    assert row.tolist() == sorted(expected_strong | expected_sample)
    assert set(row[kept.is_strong[: kept.count]].tolist()) == expected_strong
    assert set(row[kept.is_sampled[: kept.count]].tolist()) == expected_sample
    assert torch.equal(kept.value[: kept.count], firings.value[row])
    assert torch.equal(kept.group[: kept.count], firings.group[row])
    assert torch.equal(kept.window[: kept.count, 0].long(), row % 29)


def test_only_firings_up_to_the_limit_can_be_selected() -> None:
    """The limit is what makes the stream cheap: later firings below it would change nothing."""
    firings = random_firings(4000, 5, 10_000, seed=0)
    rule = Lowest(5, 8)
    first = slice(0, 2000)
    rule.select(firings.feature[first], firings.key[first])
    may_enter = firings.key <= rule.limit[firings.feature.long()]
    later = torch.arange(4000) >= 2000
    everything = slow_lowest(firings.feature.tolist(), firings.key.tolist(), 8)
    entered = {place for place in everything if place >= 2000}
    assert entered
    assert entered <= set((may_enter & later).nonzero()[:, 0].tolist())
    assert int((may_enter & later).sum()) < 100, "the limit keeps almost nothing out"


@pytest.fixture(params=[True, False], ids=["numpy", "torch"])
def numpys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NumPy as on a CPU, and by PyTorch as on a GPU."""
    monkeypatch.setattr("sae.features.ordering._is_numpys", lambda _: request.param)


@pytest.mark.usefixtures("numpys")
@pytest.mark.parametrize("largest", [1, 50, 1 << 40, 1 << 62])
def test_orders_are_stable_however_large_the_numbers(largest: int) -> None:
    numbers = torch.randint(0, 20, (1000,), generator=torch.Generator().manual_seed(0)) * largest // 19
    expected = sorted(range(1000), key=lambda place: (int(numbers[place]), place))
    assert stable_order(numbers).tolist() == expected
    assert stable_sort(numbers)[0].tolist() == sorted(numbers.tolist())
    assert stable_order(numbers[:0]).tolist() == []


@pytest.mark.usefixtures("numpys")
def test_runs() -> None:
    numbers = torch.tensor([2, 2, 2, 5, 7, 7])
    assert run_starts(numbers).tolist() == [0, 3, 4]
    assert place_in_run(numbers).tolist() == [0, 1, 2, 0, 0, 1]
    assert place_in_run(numbers[:0]).tolist() == []
    mask = torch.tensor([False, True, True, False])
    assert places_of(mask).tolist() == places_of(mask, 2).tolist() == [1, 2]
    assert lowest_in_runs(torch.tensor([3, 1, 2, -5, 9, 8]), run_starts(numbers)).tolist() == [1, -5, 8]
