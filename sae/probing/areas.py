"""The AUC of every column at once, for given labels and for labels shuffled within the limits that groups set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int

NUMBERS_AT_ONCE = 1 << 21
"""Entries of a block of columns that is ranked or multiplied at once."""


class RankedColumns:
    """Columns as ranks, from which the AUC of any labels is one product.

    With N examples, m of them positive, and mid-ranks r (equal values share the mean of their ranks), the Mann–Whitney
    statistic gives AUC = ½ + Σ_positive (2r − N − 1) / (2 m (N − m)) = P(positive > negative) + ½ P(equal)
    (Hanley & McNeil 1982). 2r − N − 1 is a whole number, so that the sums are exact and equal columns have equal areas.

    Args:
        x: the columns; equal numbers are ties.
    """

    def __init__(self, x: Float[np.ndarray, "examples columns"]) -> None:
        self.examples, self.columns = x.shape
        self._ranks = np.empty(x.shape, dtype=np.float32)
        for block in self._blocks():
            self._ranks[:, block] = _centred_ranks(x[:, block])

    def areas(self, labels: Bool[np.ndarray, "draws examples"]) -> Float[np.ndarray, "draws columns"]:
        """AUC of every column for each row of labels, each of which has both classes."""
        found = np.empty((len(labels), self.columns))
        for block, values in self.blocks_of_areas(labels):
            found[:, block] = values
        return found

    def blocks_of_areas(
        self, labels: Bool[np.ndarray, "draws examples"]
    ) -> Iterator[tuple[slice, Float[np.ndarray, "draws block"]]]:
        """As `areas`, a block of columns at a time."""
        weights, scale = labels.astype(np.float64), self._scale(labels)
        for block in self._blocks(len(labels)):
            yield block, 0.5 + (weights @ self._ranks[:, block].astype(np.float64)) / scale[:, None]

    def areas_of(
        self, labels: Bool[np.ndarray, "draws examples"], columns: Int[np.ndarray, " draws"]
    ) -> Float[np.ndarray, " draws"]:
        """AUC of one column for each row of labels."""
        return 0.5 + (labels * self._ranks[:, columns].T.astype(np.float64)).sum(1) / self._scale(labels)

    def _scale(self, labels: Bool[np.ndarray, "draws examples"]) -> Float[np.ndarray, " draws"]:
        positive = labels.sum(1).astype(np.float64)
        return 2 * positive * (self.examples - positive)

    def _blocks(self, rows: int = 0) -> Iterator[slice]:
        width = max(1, NUMBERS_AT_ONCE // max(rows, self.examples, 1))
        return (slice(start, start + width) for start in range(0, self.columns, width))


def shuffled_labels(
    labels: Bool[np.ndarray, " examples"], groups: Int[np.ndarray, " examples"], rng: np.random.Generator, draws: int
) -> Bool[np.ndarray, "draws examples"]:
    """Labels shuffled as far as they could be exchanged if they said nothing about the activations.

    In a group that has both labels, such as the tokens of a text, they are shuffled within the group. Groups that have
    one label, such as texts, exchange their labels as wholes. So what the examples of a group have in common, like the
    style of a book, is as common in the shuffled labels as in the given ones (Winkler et al. 2015, exchangeability
    blocks).
    """
    _, inverse = np.unique(groups, return_inverse=True)
    sizes = np.bincount(inverse)
    positive = np.bincount(inverse, labels)
    whole = (positive == 0) | (positive == sizes)
    by_group = np.argsort(inverse, kind="stable")
    order = np.argsort(inverse + rng.random((draws, len(labels))), axis=1)
    shuffled = np.empty((draws, len(labels)), dtype=bool)
    shuffled[:, by_group] = labels[order]
    numbers = np.flatnonzero(whole)
    if len(numbers):
        of_groups = np.zeros((draws, len(sizes)), dtype=bool)
        of_groups[:, numbers] = rng.permuted(np.tile(positive[numbers] > 0, (draws, 1)), axis=1)
        members = whole[inverse]
        shuffled[:, members] = of_groups[:, inverse[members]]
    return shuffled


def _centred_ranks(x: Float[np.ndarray, "examples columns"]) -> Float[np.ndarray, "examples columns"]:
    """2r − N − 1 with mid-ranks r, column by column."""
    count = len(x)
    order = np.argsort(x, axis=0, kind="stable")
    ordered = np.take_along_axis(x, order, axis=0)
    begins = np.ones(x.shape, dtype=bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    ends = np.ones(x.shape, dtype=bool)
    ends[:-1] = begins[1:]
    places = np.arange(count)[:, None]
    first = np.maximum.accumulate(np.where(begins, places, 0), axis=0)
    last = np.minimum.accumulate(np.where(ends, places, count - 1)[::-1], axis=0)[::-1]
    ranks = np.empty(x.shape, dtype=np.float32)
    np.put_along_axis(ranks, order, (first + last + 1 - count).astype(np.float32), axis=0)
    return ranks
