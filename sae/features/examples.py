"""Pick the stored examples from the firings kept in the pass: the strongest, and a sample of each quantile."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sae.config.settings import FeaturesConfig
from sae.features.best import WORST, Best, rank_within
from sae.features.histogram import LARGEST_BITS, fine_bins, float_bits

_SPREAD = 4.0


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
    top: Best, sample: Best, histogram: Int[np.ndarray, "d_sae fine"], scale: float, settings: FeaturesConfig
) -> Examples:
    """The strongest firings, and `per_quantile` random ones from each equal-count share of the non-zero activations.

    A sampled firing's rank among its feature's firings comes from the histogram up to its bin, and within the bin from
    its rank among the firings sampled there. If a feature fired no more often than the reservoir holds, the ranks and
    the shares are exact.
    """
    strongest = np.nonzero(top.key < WORST)
    sampled = np.nonzero(sample.key < WORST)
    value, row = sample.value[sampled], sample.row[sampled]
    share = _shares(sampled[0], value, row, histogram, scale, settings.quantiles)
    group = settings.quantiles - share
    slot = sampled[0] * (settings.quantiles + 1) + group
    order = np.argsort(slot, kind="stable")  # within a feature, the reservoir is already sorted by key
    order = order[rank_within(slot[order]) < settings.per_quantile]

    feature = np.concatenate([strongest[0], sampled[0][order]])
    groups = np.concatenate([np.zeros_like(strongest[0]), group[order]])
    values = np.concatenate([top.value[strongest], value[order]])
    rows = np.concatenate([top.row[strongest], row[order]])
    windows = np.concatenate([top.window[strongest], sample.window[sampled[0][order], sampled[1][order]]])
    final = _order(feature * (settings.quantiles + 1) + groups, LARGEST_BITS - float_bits(values), rows)
    return Examples(feature[final], groups[final], rows[final], values[final], windows[final])


def _shares(
    feature: Int[np.ndarray, " n"],
    value: Float[np.ndarray, " n"],
    row: Int[np.ndarray, " n"],
    histogram: Int[np.ndarray, "d_sae fine"],
    scale: float,
    quantiles: int,
) -> Int[np.ndarray, " n"]:
    """The equal-count share of its feature's non-zero activations that each firing belongs to; 0 is the weakest."""
    order = _order(feature, float_bits(value), row)
    bins = fine_bins(value, scale)[order]
    features, fine = feature[order], histogram.shape[1]
    cell = features * fine + bins
    members = np.bincount(cell, minlength=histogram.size)[cell]
    below = (histogram.cumsum(1) - histogram).reshape(-1)[cell]
    number = histogram.reshape(-1)[cell]
    rank = rank_within(cell)
    count = histogram.sum(1)[features]
    share = np.empty_like(feature)
    share[order] = (2 * below * members + (2 * rank + 1) * number) * quantiles // (2 * count * members)
    return share


def _order(
    slot: Int[np.ndarray, " n"], key: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Argsort by slot, then key, then row; a slot has each row at most once, and keys are in [0, 2³²).

    It sorts twice by a single number. That is fast for entries nearly in slot order, as here; `lexsort` would shuffle
    them first.
    """
    order = np.argsort(slot * (int(row.max(initial=0)) + 1) + row, kind="stable")
    return order[np.argsort(((slot << 32) | key)[order], kind="stable")]
