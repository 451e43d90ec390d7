"""The firings of each feature with the lowest keys, from a stream of firings, on any device."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.features.ordering import lowest_in_runs, place_in_run, places_of, run_starts, sort_, stable_sort

WORST = (1 << 31) - 1
"""Largest key."""

_MOVED_AT_ONCE = 1 << 18


class Lowest:
    """A rule that selects the n firings with the lowest keys of each feature. Ties go to the earlier firing.

    Args:
        d_sae: number of features.
        n: firings selected per feature.
        worst: largest key of a firing.
        device: device of the firings.

    Attributes:
        limit: `[d_sae]`, int32: only firings with keys up to this can still be selected.
    """

    def __init__(self, d_sae: int, n: int, *, worst: int = WORST, device: str | torch.device = "cpu") -> None:
        self.d_sae, self.n = d_sae, n
        self.limit = torch.full((d_sae,), worst, dtype=torch.int32, device=device)

    def select(
        self,
        feature: Int[Tensor, " firings"],
        key: Int[Tensor, " firings"],
        group: Int[Tensor, " firings"] | None = None,
    ) -> Bool[Tensor, " firings"]:
        """Select from all firings that are still candidates, in the order of their rows, and lower the limits.

        Args:
            feature: the feature that fired.
            key: an int32.
            group: number of the firing's group (a document or a section of one), of which only the best firing is
                selected; None: there are no groups.
        """
        if group is None or not len(feature):
            return self._lowest(feature, key)
        best = _best_of_groups(feature, key, group)
        selected = torch.zeros_like(feature, dtype=torch.bool)
        chosen = self._lowest(feature.index_select(0, best), key.index_select(0, best))
        return selected.index_copy_(0, best, chosen)

    def _lowest(self, feature: Int[Tensor, " firings"], key: Int[Tensor, " firings"]) -> Bool[Tensor, " firings"]:
        """Find the n-th lowest key of each feature; if too many equal it, the earliest of them are selected."""
        if not len(feature):
            return torch.zeros_like(feature, dtype=torch.bool)
        order = sort_(_pair(feature, key))
        features = torch.arange(self.d_sae + 1, device=order.device)
        bounds = torch.searchsorted(order, (features << 32) - (1 << 31))
        last, end = bounds[:-1] + (self.n - 1), bounds[1:]
        nth, next_one = (order[(last + more).clamp_max_(len(order) - 1)] for more in (0, 1))
        full, crowded = last < end, (last + 1 < end) & (nth == next_one)
        nth = _low(nth)
        self.limit = (nth - 1).clamp_min_(-1 << 31).int().where(full, self.limit)
        nth = nth.int().where(full, torch.full_like(self.limit, WORST))
        selected = key <= nth.index_select(0, feature)
        if crowded.any():
            ties = places_of(crowded.index_select(0, feature).logical_and_(key == nth.index_select(0, feature)))
            tied, tie_order = stable_sort(feature[ties])
            below = torch.searchsorted(order, _pair(tied, nth[tied])) - bounds[tied]
            selected[ties[tie_order]] = place_in_run(tied) < self.n - below
        return selected


class Kept:
    """Firings kept because one of two rules selects them: the strongest, or a random sample.

    Firings are added to a buffer. Whenever it is full, both rules select from it, and the others are dropped, so that
    memory does not grow with the stream. The first selection is early: it lowers the limits.

    Args:
        strongest: the rule for keys −1 − (bits of the value).
        sample: the rule for random keys.
        width: number of tokens in a window.
        room: firings that can be added before the rules select again.

    Attributes:
        feature, key: int32; the key is the random one.
        row, group: int64.
        value: float32.
        window: `[capacity, width]`, float16.
        is_strong, is_sampled: whether a rule selects the firing, or may select it.
        count: number of firings in the buffer.
    """

    def __init__(self, strongest: Lowest, sample: Lowest, width: int, room: int) -> None:
        self.strongest, self.sample = strongest, sample
        device, self.count = strongest.limit.device, 0
        capacity = strongest.d_sae * (strongest.n + sample.n) + room
        self._full = -(-capacity // 3)
        self.feature = torch.empty(capacity, dtype=torch.int32, device=device)
        self.row = torch.empty(capacity, dtype=torch.int64, device=device)
        self.value = torch.empty(capacity, dtype=torch.float32, device=device)
        self.group, self.key = torch.empty_like(self.row), torch.empty_like(self.feature)
        self.window = torch.empty(capacity, width, dtype=torch.float16, device=device)
        self.is_strong, self.is_sampled = (torch.empty(capacity, dtype=torch.bool, device=device) for _ in range(2))

    @property
    def room(self) -> int:
        """How many firings can be added before the next selection."""
        return self._full - self.count

    def places(self, number: int) -> slice:
        """Places for some more firings, which the caller fills with all of their columns, in the order of rows."""
        self.count += number
        return slice(self.count - number, self.count)

    def select(self) -> None:
        """Drop the firings that no rule selects."""
        feature, value, key, group, is_strong, is_sampled = (
            column[: self.count]
            for column in (self.feature, self.value, self.key, self.group, self.is_strong, self.is_sampled)
        )
        _select(self.strongest, is_strong, feature, strength_keys(value), group)
        _select(self.sample, is_sampled, feature, key)
        left = places_of(is_strong | is_sampled)
        for column in (
            self.feature, self.row, self.value, self.group, self.key, self.is_strong, self.is_sampled, self.window
        ):  # fmt: skip
            _move(column, left)
        self.count, self._full = len(left), len(self.row)


def _select(rule: Lowest, selected: Bool[Tensor, " n"], *columns: Int[Tensor, " n"]) -> None:
    """Select from those already selected."""
    among = places_of(selected)
    selected.index_copy_(0, among, rule.select(*(column.index_select(0, among) for column in columns)))


def strength_keys(value: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Keys of positive float32 values, int32, lowest for the largest."""
    return ~value.view(torch.int32)


def _best_of_groups(
    feature: Int[Tensor, " firings"], key: Int[Tensor, " firings"], group: Int[Tensor, " firings"]
) -> Int[Tensor, " best"]:
    """Places of the firing with the lowest key of each feature and group, the earliest if there are several."""
    member = (feature.long() * (int(group.max()) + 1)).add_(group)
    member, order = stable_sort(member)
    starts = run_starts(member)
    ranked = _pair(key.index_select(0, order), torch.arange(len(order), device=order.device))
    return sort_(order.index_select(0, _low(lowest_in_runs(ranked, starts))))


def _pair(high: Int[Tensor, " n"], low: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """high · 2³² + low, of numbers that fit into an int32: in their order."""
    return (high.long() << 32).add_(low)


def _low(pair: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    return ((pair + (1 << 31)) & ((1 << 32) - 1)) - (1 << 31)


def _move(column: Tensor, places: Int[Tensor, " n"]) -> None:
    """column[:n] = column[places], for ascending places, a part at a time."""
    for start in range(0, len(places), _MOVED_AT_ONCE):
        part = places[start : start + _MOVED_AT_ONCE]
        column[start : start + len(part)] = column.index_select(0, part)
