"""Pick the stored examples from the firings kept in the pass: the strongest, and a sample of each quantile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.config.settings import FeaturesConfig
from sae.features.best import Kept
from sae.features.histogram import fine_bins
from sae.features.ordering import place_in_run, places_of, stable_order, stable_sort
from sae.features.windows import Reach

_SPREAD = 4.0
_PICKED_AT_ONCE = 1 << 19
"""Firings from which examples are picked at once: few enough to sort a feature, a key and a place as one integer."""


@dataclass(frozen=True)
class Examples:
    """Firings, sorted by feature and then by group, strongest first.

    Attributes:
        feature: ascending.
        group: 0 for the strongest of all, 1 for the strongest quantile, … for the weakest.
        row: the token it fired on.
        value: the activation.
        window: the feature's activations around the token.
    """

    feature: Int[np.ndarray, " n"]
    group: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    value: Float[np.ndarray, " n"]
    window: Float[np.ndarray, "n width"]


def reservoir_size(settings: FeaturesConfig) -> int:
    """Number of random firings to keep per feature so that a quantile rarely has fewer than `per_quantile`.

    The number m expected in one quantile solves m − 4√m = per_quantile: a margin of four standard deviations.
    """
    root = (_SPREAD + math.sqrt(_SPREAD**2 + 4 * settings.per_quantile)) / 2
    return settings.quantiles * math.ceil(root**2)


def pick_examples(
    kept: Kept, histogram: Int[Tensor, "d_sae fine"], scale: float, settings: FeaturesConfig, reach: Reach
) -> Examples:
    """The strongest firings, and `per_quantile` random ones from each equal-count share of the non-zero activations.

    A sampled firing's rank among its feature's firings comes from the histogram up to its bin, and within the bin from
    its rank among the firings sampled there. If a feature fired no more often than the reservoir holds, the ranks and
    the shares are exact.

    Args:
        kept: firings that the rules have just selected.
        histogram: counts in fine bins, on the CPU.
        scale: scale of the histogram.
        settings: quantiles and number of examples of each.
        reach: size of the examples' windows.
    """
    d_sae, count = len(histogram), kept.count
    feature, order = stable_sort(kept.feature[:count])
    value, key, is_strong, is_sampled = (
        column.index_select(0, order).cpu() for column in (kept.value, kept.key, kept.is_strong, kept.is_sampled)
    )
    feature = feature.cpu().long()
    at_once = max(1, _PICKED_AT_ONCE // (kept.strongest.n + kept.sample.n))
    firsts = range(0, d_sae, at_once)
    bounds = torch.searchsorted(feature, torch.tensor([*firsts, d_sae])).tolist()
    picked = []
    for first, (start, end) in zip(firsts, pairwise(bounds), strict=True):
        part, counts = slice(start, end), histogram[first : first + at_once]
        slot, place = _pick(
            feature[part] - first, value[part], key[part], is_strong[part], is_sampled[part],
            counts, scale, settings,
        )  # fmt: skip
        picked.append((slot + first * (settings.quantiles + 1), place + start))
    slot, place = (torch.cat(parts) for parts in zip(*picked, strict=True))
    chosen = order.index_select(0, place.to(order.device))
    row, value, window = (
        column.index_select(0, chosen).cpu().numpy() for column in (kept.row, kept.value, kept.window)
    )
    feature, group = (part.numpy() for part in (slot // (settings.quantiles + 1), slot % (settings.quantiles + 1)))
    within = reach.within_context()
    if within != reach:
        outside = (reach.before - within.before, reach.after - within.after)
        window = np.pad(window, ((0, 0), outside))
    return Examples(feature, group, row, value, window)


def _pick(
    feature: Int[Tensor, " n"],
    value: Float[Tensor, " n"],
    key: Int[Tensor, " n"],
    is_strong: Bool[Tensor, " n"],
    is_sampled: Bool[Tensor, " n"],
    histogram: Int[Tensor, "features fine"],
    scale: float,
    settings: FeaturesConfig,
) -> tuple[Int[Tensor, " picked"], Int[Tensor, " picked"]]:
    """The examples of some features from their firings, which are sorted by feature and then by row.

    Returns:
        Slot feature · (quantiles + 1) + group and place of each example, sorted by slot, strongest first.
    """
    strongest, sampled = places_of(is_strong), places_of(is_sampled)
    owner, values = feature.index_select(0, sampled), value.index_select(0, sampled)
    slot = owner * (settings.quantiles + 1) + settings.quantiles
    slot -= _shares(owner, values, histogram, scale, settings.quantiles)
    order = stable_order((owner << 32).add_(key.index_select(0, sampled)).add_(1 << 31))
    slot, by_slot = stable_sort(slot.index_select(0, order))
    shown = place_in_run(slot) < settings.per_quantile
    slot, order = slot[shown], order[by_slot[shown]]

    place = torch.cat([strongest, sampled[order]])
    slot = torch.cat([feature[strongest] * (settings.quantiles + 1), slot])
    final = stable_order(place)
    final = final[stable_order((1 << 31) - 1 - value[place[final]].view(torch.int32).long())]
    slot, by_slot = stable_sort(slot[final])
    return slot, place[final[by_slot]]


def _shares(
    feature: Int[Tensor, " n"],
    value: Float[Tensor, " n"],
    histogram: Int[Tensor, "features fine"],
    scale: float,
    quantiles: int,
) -> Int[Tensor, " n"]:
    """The equal-count share of its feature's non-zero activations that each firing belongs to; 0 is the weakest.

    Firings are sorted by feature and then by row; of equal values the earlier is the weaker.
    """
    order = stable_order((feature << 31).add_(value.view(torch.int32)))
    feature = feature.index_select(0, order)
    cell = (feature * histogram.shape[1]).add_(fine_bins(value.index_select(0, order), scale))
    members = torch.bincount(cell, minlength=histogram.numel()).index_select(0, cell)
    number = histogram.flatten().index_select(0, cell)
    below = histogram.cumsum(1).flatten().index_select(0, cell) - number
    count = histogram.sum(1).index_select(0, feature)
    rank = 2 * below * members + (2 * place_in_run(cell) + 1) * number
    return torch.empty_like(cell).index_copy_(0, order, rank * quantiles // (2 * count * members))
