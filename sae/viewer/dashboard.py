"""What SAEDashboard and Neuronpedia show of a feature, under the names that their files share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.features.feature import Example, Feature
from sae.features.store import Features

NEURONS, BARS = 3, 50
"""Rows of the table of neurons, and bars of the histogram of logits, as SAEDashboard has them by default."""
OF_STRONGEST = -1.0
"""`bin_min` and `bin_contains` of the strongest activations, which belong to no interval."""
_DIGITS = 6


@dataclass(frozen=True)
class Interval:
    """A range of activations, and the share of all tokens scanned on which the feature's activation is in it."""

    low: float
    high: float
    contains: float


@dataclass(frozen=True)
class Shown:
    """An activation that is shown.

    Attributes:
        group: 0 for the strongest, 1 for the strongest quantile, … for the weakest.
        interval: the activations among which it was drawn; `low` and `contains` are −1 for the strongest.
        example: the tokens and the feature's activations on them.
    """

    group: int
    interval: Interval
    example: Example

    @property
    def values(self) -> list[float]:
        """The feature's activation on each token."""
        return [short(value) for value in self.example.activations]


class Dashboard:
    """Features of a store as columns: JSON-able numbers and texts by the names of SAEDashboard and Neuronpedia.

    A column is empty if the store, the decoder and the unembedding do not determine it; see `missing`.

    Args:
        features: the store.
        W_dec: the dictionary's decoder; None: without neurons.
        W_U: the unembedding that its directions meet; None: without the histogram of logits.
        output_hook: hook point of the decoder's output; None: the store's.
        model_facts: entries of `ModelInfo`; empty if unknown.
        dataset: where the text comes from; empty if unknown.
    """

    def __init__(
        self,
        features: Features,
        W_dec: Float[Tensor, "d_sae d_in"] | None = None,
        W_U: Float[Tensor, "d_in vocab"] | None = None,
        *,
        output_hook: str | None = None,
        model_facts: Mapping[str, Any] | None = None,
        dataset: str = "",
    ) -> None:
        self.features, self.rows = features, features.info["rows"]
        self._W_dec, self._W_U = W_dec, W_U
        self.output_hook: str = features.info["hook"] if output_hook is None else output_hook
        self.model_facts, self.dataset = model_facts or {}, dataset

    @property
    def contexts(self) -> int:
        """Number of contexts scanned."""
        return -(-self.rows // self.features.info["context_length"])

    @property
    def missing(self) -> list[str]:
        """The columns that stay empty, each with the reason."""
        reasons = {
            "correlated_neurons_*, correlated_features_*": "a feature store has no correlations of activations",
            "neuron_alignment_*": "needs the dictionary" if self._W_dec is None else "",
            "neg_*, pos_*": "" if self.features.has_logits else "the store has no logits",
            "logits_hist_data_*": "needs the language model" if self._W_U is None else "",
        }
        if self.features.info["hook"].endswith("attn.hook_z"):
            reasons["decoder_weights_dist"] = "the store does not have the number of attention heads"
        return [f"{columns}: {reason}" for columns, reason in reasons.items() if reason]

    def columns(self, feature: Feature) -> dict[str, Any]:
        """The columns of a feature other than its activations.

        `frac_nonzero` is the share of all tokens scanned, masked ones among them, as in SAEDashboard;
        `Feature.density` is that of the eligible ones.
        """
        edges, counts = feature.histogram.edges, feature.histogram.counts
        return {
            **self._neurons(feature.index),
            **{
                f"correlated_{of}_{what}": [] for of in ("neurons", "features") for what in ("indices", "pearson", "l1")
            },
            **_logits("neg", feature.suppressed),
            **_logits("pos", feature.promoted),
            "frac_nonzero": short(feature.count / max(1, self.rows)),
            "freq_hist_data_bar_heights": counts,
            "freq_hist_data_bar_values": [short((low + high) / 2) for low, high in pairwise(edges)],
            **self._logit_bars(feature.index),
            "decoder_weights_dist": [],
        }

    def activations(self, feature: Feature) -> Iterator[Shown]:
        """The stored examples: the strongest, then those of each quantile, the strongest quantile first."""
        strongest = Interval(OF_STRONGEST, short(feature.max), OF_STRONGEST)
        yield from (Shown(0, strongest, example) for example in feature.top)
        shares, first = len(feature.quantiles), self.features.info["histogram_edges"][0]
        for group, examples in enumerate(feature.quantiles, 1):
            if examples:
                interval = interval_of(feature, shares - group, shares, self.rows, first)
                yield from (Shown(group, interval, example) for example in examples)

    def _neurons(self, index: int) -> dict[str, list[Any]]:
        """The neurons that the decoder direction writes to most, and their parts of its L1 norm."""
        place, value, part = [], [], []
        if self._W_dec is not None:
            row = self._W_dec[index].detach().float()
            largest = row.topk(min(NEURONS, len(row)))
            place, value = largest.indices.tolist(), _shortened(largest.values.tolist())
            part = _shortened((largest.values.abs() / row.abs().sum().clamp(min=1e-30)).tolist())
        return {"neuron_alignment_indices": place, "neuron_alignment_values": value, "neuron_alignment_l1": part}

    def _logit_bars(self, index: int) -> dict[str, list[Any]]:
        """A histogram of the feature's effect on the logit of each token of the vocabulary."""
        heights: list[int] = []
        values: list[float] = []
        if self._W_dec is not None and self._W_U is not None:
            heights, values = equal_bars(self._W_dec[index].detach().float() @ self._W_U.float())
        return {"logits_hist_data_bar_heights": heights, "logits_hist_data_bar_values": values}


def interval_of(feature: Feature, share: int, shares: int, rows: int, first_edge: float) -> Interval:
    """The bins of a feature's histogram that its `share`-th of `shares` equal-count shares reaches into.

    The quantiles' own bounds are not stored. The interval holds all activations of the share, and some of its
    neighbours'; what it contains is counted exactly.

    Args:
        feature: it fires.
        share: 0 for the weakest.
        shares: number of shares.
        rows: number of tokens scanned.
        first_edge: the store's first edge; the bin above it also holds everything below.
    """
    edges, counts, total = feature.histogram.edges, feature.histogram.counts, feature.count
    up_to = list(accumulate(counts))
    begins = [end - count for end, count in zip(up_to, counts, strict=True)]
    bins = [
        place
        for place, (begin, end) in enumerate(zip(begins, up_to, strict=True))
        if begin < end and begin * shares < (share + 1) * total and end * shares > share * total
    ]
    low = 0.0 if edges[bins[0]] == first_edge else edges[bins[0]]
    high = feature.max if bins[-1] == len(counts) - 1 else edges[bins[-1] + 1]
    return Interval(short(low), short(high), short(sum(counts[bins[0] : bins[-1] + 1]) / rows))


def equal_bars(values: Float[Tensor, " n"], bars: int = BARS) -> tuple[list[int], list[float]]:
    """Heights and centres of a histogram between the least and the largest value; one bar if they are equal."""
    values = values.double()
    low, high = float(values.min()), float(values.max())
    width = (high - low) / bars
    if not width > 0:
        return [len(values)], [short(low)]
    place = ((values - low) / width).long().clamp_(max=bars - 1)
    return torch.bincount(place, minlength=bars).tolist(), [short(low + (bar + 0.5) * width) for bar in range(bars)]


def short(number: float) -> float:
    """The number with six significant digits."""
    return float(f"{number:.{_DIGITS}g}")


def _shortened(numbers: Sequence[float]) -> list[float]:
    return [short(number) for number in numbers]


def _logits(sign: str, entries: Sequence[tuple[str, float]] | None) -> dict[str, list[Any]]:
    entries = entries or []
    return {f"{sign}_str": [token for token, _ in entries], f"{sign}_values": [short(logit) for _, logit in entries]}
