"""Score a probe's decisions against labels: accuracy, F1 and AUC with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae.results.estimate import Estimate, ratio
from sae.results.table import NONE

METRICS = ("accuracy", "f1", "auc")


@dataclass(frozen=True)
class BinaryScores:
    """Scores of a probe on a set of examples, with standard errors over groups of examples (see `binary_scores`)."""

    accuracy: Estimate
    f1: Estimate
    auc: Estimate


@dataclass(frozen=True)
class SplitEstimate:
    """A score, averaged over random splits of the same examples.

    Attributes:
        value: mean over the splits.
        standard_error: standard error over test examples: the mean over splits, not divided by √splits because the
            splits share their examples. None if a split had too few.
        deviation: standard deviation over the splits; None for one split.
    """

    value: float
    standard_error: float | None
    deviation: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval over test examples, value ± 1.96 · standard_error; None if the error is unknown."""
        return Estimate(self.value, self.standard_error).interval

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.standard_error, "split_deviation": self.deviation}

    @staticmethod
    def from_json(record: dict[str, Any]) -> SplitEstimate:
        return SplitEstimate(record["value"], record["standard_error"], record["split_deviation"])

    def __str__(self) -> str:
        """`0.87 ± 0.03`: the value and its standard error over test examples."""
        return plus_minus(self.value, self.standard_error)


@dataclass(frozen=True)
class SplitScores:
    """`BinaryScores` averaged over splits, and possibly over classes."""

    accuracy: SplitEstimate
    f1: SplitEstimate
    auc: SplitEstimate

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_json() for name in METRICS}

    @staticmethod
    def from_json(record: dict[str, Any]) -> SplitScores:
        return SplitScores(*(SplitEstimate.from_json(record[name]) for name in METRICS))


def binary_scores(
    labels: Bool[np.ndarray, " rows"], decisions: Float[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"]
) -> BinaryScores:
    """Accuracy and F1 of `decisions > 0`, and the area under the ROC curve of `decisions`.

    Groups are the independent draws: a single text, or all tokens of a text. With TP, FP, FN counted per group,
    accuracy is a mean and F1 = Σ 2TP / Σ (2TP + FP + FN) a ratio over groups, both with the standard error of a ratio
    (`sae.results.estimate.ratio`). For AUC, see `auc`. F1 is 0 if there are no true or predicted positives.

    Args:
        labels: True for the positive class.
        decisions: log-odds of the positive class.
        groups: number of each example's group.
    """
    predicted = decisions > 0
    numbers, inverse = np.unique(groups, return_inverse=True)

    def by_group(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.bincount(inverse, values.astype(np.float64), minlength=len(numbers)))

    both = by_group(2.0 * (predicted & labels))
    f1 = ratio(both, both + by_group(predicted != labels))
    return BinaryScores(
        ratio(by_group(predicted == labels), by_group(np.ones(len(labels)))),
        Estimate(0.0, f1.standard_error) if f1.value is None else f1,
        auc(labels, decisions, groups),
    )


def auc(
    labels: Bool[np.ndarray, " rows"], decisions: Float[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"]
) -> Estimate:
    """P(decision of a positive > decision of a negative) + ½ P(equal).

    The standard error is that of DeLong, DeLong and Clarke-Pearson (1988). V_i is the share of negatives below positive
    i (ties count half), W_j the share of positives above negative j. With m positives and n negatives,
    SE² = Σ(V_i − A)²/(m(m−1)) + Σ(W_j − A)²/(n(n−1)). Where groups have several examples, the groups are the draws
    (Obuchowski 1997): with P_g = Σ(V_i − A)/m and N_g = Σ(W_j − A)/n over the examples of group g,
    SE² = a/(a−1) ΣP_g² + b/(b−1) ΣN_g² + 2G/(G−1) ΣP_g N_g, where a groups have a positive, b a negative, and there are
    G. The error is unknown (None) if a or b is 1. It is 0, without being certain, if all positives are above all
    negatives, or if all decisions are equal.
    """
    if labels.all() or not labels.any():
        return Estimate(None, None)
    value, terms = _auc_and_terms(labels, decisions)
    return Estimate(value, _error_over_groups(terms, labels, groups))


def auc_difference(
    labels: Bool[np.ndarray, " rows"], first: Float[np.ndarray, " rows"], second: Float[np.ndarray, " rows"],
    groups: Int[np.ndarray, " rows"],
) -> Estimate:  # fmt: skip
    """AUC of the first decisions minus that of the second, on the same examples.

    The error is DeLong's for two correlated areas: the terms of `auc` are subtracted before they are summed over groups
    and squared, so that it includes their covariance.
    """
    if labels.all() or not labels.any():
        return Estimate(None, None)
    (value, terms), (other, other_terms) = (_auc_and_terms(labels, decisions) for decisions in (first, second))
    return Estimate(value - other, _error_over_groups(terms - other_terms, labels, groups))


def majority_scores(
    training_labels: Bool[np.ndarray, " rows"],
    labels: Bool[np.ndarray, " examples"],
    groups: Int[np.ndarray, " examples"],
) -> BinaryScores:
    """Scores of a probe that ignores its input.

    Accuracy is that of predicting the training examples' majority class, F1 that of always predicting the positive
    class. AUC is ½.
    """
    predicts_positive = 2 * training_labels.mean() > 1
    constant = np.ones(len(labels))
    accuracy = binary_scores(labels, constant if predicts_positive else -constant, groups).accuracy
    always_positive = binary_scores(labels, constant, groups)
    return BinaryScores(accuracy, always_positive.f1, Estimate(0.5, 0.0))


def over_splits(scores: Sequence[BinaryScores]) -> SplitScores:
    """Mean over splits, with the mean standard error and the deviation over splits."""
    return SplitScores(*(_over_splits([getattr(split, name) for split in scores]) for name in METRICS))


def over_classes(scores: Sequence[SplitScores]) -> SplitScores:
    """Unweighted mean over classes. All classes are scored on the same examples, so the mean of their standard errors
    is an upper bound, exact if their errors are perfectly correlated.
    """
    return SplitScores(*(_over_classes([getattr(label, name) for label in scores]) for name in METRICS))


def plus_minus(value: float | None, error: float | None, decimals: int = 3, *, sign: bool = False) -> str:
    """A value and its standard error as text, such as `0.870 ± 0.030`."""
    if value is None:
        return NONE
    shown = f"{value:{'+' if sign else ''}.{decimals}f}"
    return f"{shown} ± {NONE if error is None else f'{error:.{decimals}f}'}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent values and its standard error, which is None for fewer than two."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _auc_and_terms(
    labels: Bool[np.ndarray, " rows"], decisions: Float[np.ndarray, " rows"]
) -> tuple[float, Float[np.ndarray, " rows"]]:
    """The area, and each example's term of its error: (V_i − A)/m of a positive, (W_j − A)/n of a negative."""
    positive, negative = decisions[labels], decisions[~labels]
    above = _share_below(positive, negative)
    below = 1 - _share_below(negative, positive)
    value = float(above.mean())
    terms = np.zeros(len(labels))
    terms[labels] = (above - value) / len(positive)
    terms[~labels] = (below - value) / len(negative)
    return value, terms


def _error_over_groups(
    terms: Float[np.ndarray, " rows"], labels: Bool[np.ndarray, " rows"], groups: Int[np.ndarray, " rows"]
) -> float | None:
    """The standard error of an area, see `auc`; None if fewer than two groups have a positive, or a negative."""
    numbers, inverse = np.unique(groups, return_inverse=True)
    sides = [len(np.unique(groups[side])) for side in (labels, ~labels)]
    if min(sides) < 2:
        return None
    positive, negative = (np.bincount(inverse, terms * side, minlength=len(numbers)) for side in (labels, ~labels))
    a, b, both = (count / (count - 1) for count in (*sides, len(numbers)))
    square = a * (positive**2).sum() + b * (negative**2).sum() + 2 * both * (positive * negative).sum()
    return math.sqrt(max(0.0, float(square)))


def _share_below(values: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """The share of `others` below each value; ties count half."""
    ordered = np.sort(others)
    places = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return places / (2 * len(ordered))


def _over_splits(estimates: Sequence[Estimate]) -> SplitEstimate:
    values = [estimate.value for estimate in estimates]
    assert None not in values
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None  # type: ignore[arg-type]
    return SplitEstimate(float(np.mean(values)), _mean([e.standard_error for e in estimates]), deviation)  # type: ignore[arg-type]


def _over_classes(estimates: Sequence[SplitEstimate]) -> SplitEstimate:
    value = float(np.mean([estimate.value for estimate in estimates]))
    return SplitEstimate(
        value, _mean([e.standard_error for e in estimates]), _mean([estimate.deviation for estimate in estimates])
    )


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if len(numbers) == len(values) else None
