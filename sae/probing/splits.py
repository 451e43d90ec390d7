"""Split examples into three stratified parts without splitting any group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from sae.errors import DataError

LEAST_PER_PART = 2


@dataclass(frozen=True)
class Split:
    """Rows of the examples for training, for choosing the regularisation, and for scoring once."""

    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    test: Int[np.ndarray, " test"]

    @property
    def fitted(self) -> Int[np.ndarray, " fitted"]:
        """Training and validation rows."""
        return np.concatenate([self.train, self.validation])


def split_examples(
    labels: Sequence[str], groups: Int[np.ndarray, " rows"], *,
    test_fraction: float, validation_fraction: float, rng: np.random.Generator,
) -> Split:  # fmt: skip
    """A random split of the groups, with the same shares in each class (the class of a group's first example).

    Args:
        labels: class of each example.
        groups: examples of the same group, such as equal texts or the tokens of one text, stay together.
        test_fraction, validation_fraction: shares of the groups.
        rng: draws the split; the same state, labels and groups give the same split.
    """
    numbers, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    classes = np.array(labels)[first]
    parts = np.zeros(len(numbers), dtype=np.int64)
    for name in sorted(set(classes.tolist())):
        members = rng.permutation(np.flatnonzero(classes == name))
        test = round(test_fraction * len(members))
        validation = round(validation_fraction * len(members))
        parts[members[:test]] = 2
        parts[members[test : test + validation]] = 1
    return Split(*(np.flatnonzero(parts[inverse] == part) for part in range(3)))


def check_split(split: Split, positive: Bool[np.ndarray, " rows"], what: str) -> None:
    """Raise DataError if a part has too few examples of either class."""
    for name, rows in (("training", split.train), ("validation", split.validation), ("test", split.test)):
        positives = int(positive[rows].sum())
        least = min(positives, len(rows) - positives)
        if least < LEAST_PER_PART:
            raise DataError(
                f"{what}: {least} {name} example{'' if least == 1 else 's'} on one side, expected at least "
                f"{LEAST_PER_PART}: give more examples of each class, or a larger {_setting(name)}"
            )


def _setting(part: str) -> str:
    return {"training": "share for training", "validation": "validation_fraction", "test": "test_fraction"}[part]


@dataclass(frozen=True)
class Halves:
    """Rows of the examples for a search, and for scoring what it found."""

    search: Int[np.ndarray, " search"]
    held_out: Int[np.ndarray, " held_out"]


def split_in_halves(
    positive: Bool[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"], rng: np.random.Generator, what: str
) -> Halves:
    """A random half of the groups of each class, and the others (see `split_examples`).

    Raises:
        DataError: a half has too few examples of either class, as with too few groups.
    """
    split = split_examples(positive.astype(str).tolist(), groups, test_fraction=0.5, validation_fraction=0.0, rng=rng)
    halves = Halves(split.train, split.test)
    for rows in (halves.search, halves.held_out):
        positives = int(positive[rows].sum())
        least = min(positives, len(rows) - positives)
        if least < LEAST_PER_PART:
            raise DataError(
                f"{what}: {least} example{'' if least == 1 else 's'} on one side of a half, expected at least "
                f"{LEAST_PER_PART}: give more examples of each side, from more texts ({len(np.unique(groups)):,} now)"
            )
    return halves
