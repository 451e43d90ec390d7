"""Labels and a probe's decisions in; accuracy, F1 and AUC with standard errors out."""

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
    """Of one probe on one set of examples; standard errors are over groups of examples (see `binary_scores`)."""

    accuracy: Estimate
    f1: Estimate
    auc: Estimate


@dataclass(frozen=True)
class SplitEstimate:
    """A score, averaged over random splits of the same examples.

    Attributes:
        value: mean over the splits.
        standard_error: over test examples: the mean of the splits' own. It is not divided by √splits, since the splits
            share their examples. None where a split had too few.
        deviation: standard deviation over the splits; None for one split.
    """

    value: float
    standard_error: float | None
    deviation: float | None

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.standard_error, "split_deviation": self.deviation}

    @staticmethod
    def from_json(record: dict[str, Any]) -> SplitEstimate:
        return SplitEstimate(record["value"], record["standard_error"], record["split_deviation"])

    def __str__(self) -> str:
        """`0.87 ± 0.03`, the second the standard error over test examples."""
        return f"{self.value:.3f} ± " + (NONE if self.standard_error is None else f"{self.standard_error:.3f}")


@dataclass(frozen=True)
class SplitScores:
    """`BinaryScores` averaged over splits, or over classes too."""

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

    Groups are the independent draws: a text by itself, or all tokens of one text. With TP, FP, FN counted per group,
    accuracy is a mean and F1 = Σ 2TP / Σ (2TP + FP + FN) a ratio over groups, both with the standard error of a ratio
    (`sae.results.estimate.ratio`). AUC as in `auc`. F1 is 0 where nothing is positive, neither truly nor predicted.

    Args:
        labels: True for the positive class.
        decisions: log-odds of it.
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

    The standard error is DeLong, DeLong and Clarke-Pearson's (1988): with V_i the share of negatives below positive i
    (ties count half), W_j that of positives above negative j, m positives and n negatives,
    SE² = Σ(V_i − A)²/(m(m−1)) + Σ(W_j − A)²/(n(n−1)). Where groups have several examples, their terms are summed before
    they are squared (Obuchowski 1997).
    """
    positive, negative = decisions[labels], decisions[~labels]
    m, n = len(positive), len(negative)
    if not m or not n:
        return Estimate(None, None)
    above = _share_below(positive, negative)
    below = 1 - _share_below(negative, positive)
    value = float(above.mean())
    if min(m, n) < 2:
        return Estimate(value, None)
    terms = np.zeros(len(labels))
    terms[labels] = (above - value) / math.sqrt(m * (m - 1))
    terms[~labels] = (below - value) / math.sqrt(n * (n - 1))
    _, inverse = np.unique(groups, return_inverse=True)
    return Estimate(value, math.sqrt(float(np.square(np.bincount(inverse, terms)).sum())))


def majority_scores(
    training_labels: Bool[np.ndarray, " rows"],
    labels: Bool[np.ndarray, " examples"],
    groups: Int[np.ndarray, " examples"],
) -> BinaryScores:
    """What a probe that does not look at its input can score.

    Accuracy is that of the training examples' majority class, F1 that of always saying yes, AUC is ½.
    """
    says_yes = 2 * training_labels.mean() > 1
    constant = np.ones(len(labels))
    accuracy = binary_scores(labels, constant if says_yes else -constant, groups).accuracy
    always = binary_scores(labels, constant, groups)
    return BinaryScores(accuracy, always.f1, Estimate(0.5, 0.0))


def over_splits(scores: Sequence[BinaryScores]) -> SplitScores:
    """Mean over splits, with the mean standard error and the deviation between splits."""
    return SplitScores(*(_over_splits([getattr(one, name) for one in scores]) for name in METRICS))


def over_classes(scores: Sequence[SplitScores]) -> SplitScores:
    """Plain mean over classes. All are scored on the same examples, so the mean of their standard errors, which is
    right if they err together, is an upper bound.
    """
    return SplitScores(*(_over_classes([getattr(one, name) for one in scores]) for name in METRICS))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of independent values and its standard error, None for fewer than two."""
    mean = float(np.mean(values))
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _share_below(of: Float[np.ndarray, " m"], others: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """For each value the share of the others that are smaller, ties as half."""
    ordered = np.sort(others)
    places = np.searchsorted(ordered, of, "left") + np.searchsorted(ordered, of, "right")
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
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None
