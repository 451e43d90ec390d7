"""Scores against scikit-learn, standard errors against slow references and against what resampling finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from sae.probing.scores import (
    BinaryScores,
    SplitEstimate,
    auc,
    auc_difference,
    binary_scores,
    majority_scores,
    mean_and_error,
    over_classes,
    over_splits,
)
from sae.results.estimate import Estimate


def examples(seed: int, count: int = 60, signal: float = 1.0, positive: float = 0.4):
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < positive
    return labels, np.round(rng.normal(size=count) + signal * labels - 0.5, 1)  # rounded, so that there are ties


def alone(labels: np.ndarray) -> np.ndarray:
    return np.arange(len(labels))


@pytest.mark.parametrize("seed", range(5))
def test_values_are_scikit_learns(seed: int) -> None:
    labels, decisions = examples(seed)
    scores = binary_scores(labels, decisions, alone(labels))
    assert scores.accuracy.value == pytest.approx(accuracy_score(labels, decisions > 0), abs=1e-12)
    assert scores.f1.value == pytest.approx(f1_score(labels, decisions > 0), abs=1e-12)
    assert scores.auc.value == pytest.approx(roc_auc_score(labels, decisions), abs=1e-12)


def test_the_error_of_an_accuracy_is_the_binomial_one() -> None:
    labels, decisions = examples(0, count=80)
    p = float(((decisions > 0) == labels).mean())
    error = binary_scores(labels, decisions, alone(labels)).accuracy.standard_error
    assert error == pytest.approx(math.sqrt(p * (1 - p) / 79), abs=1e-12)


def delong(labels: np.ndarray, decisions: np.ndarray) -> float:
    """DeLong's variance, pair by pair."""
    positive, negative = decisions[labels].tolist(), decisions[~labels].tolist()
    psi = [[1.0 if a > b else 0.5 if a == b else 0.0 for b in negative] for a in positive]
    rows = [sum(row) / len(negative) for row in psi]
    columns = [sum(row[j] for row in psi) / len(positive) for j in range(len(negative))]
    area = sum(rows) / len(rows)
    s10 = sum((v - area) ** 2 for v in rows) / (len(rows) - 1)
    s01 = sum((w - area) ** 2 for w in columns) / (len(columns) - 1)
    return math.sqrt(s10 / len(rows) + s01 / len(columns))


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_an_auc_is_delongs(seed: int) -> None:
    labels, decisions = examples(seed, count=40)
    assert auc(labels, decisions, alone(labels)).standard_error == pytest.approx(delong(labels, decisions), abs=1e-12)


def test_errors_are_what_resampling_finds() -> None:
    """Five hundred draws from one distribution: their scatter is the error that a single draw tells, on average."""
    values, errors = [], []
    for seed in range(500):
        labels, decisions = examples(seed, count=100)
        scores = binary_scores(labels, decisions, alone(labels))
        values.append([scores.accuracy.value, scores.f1.value, scores.auc.value])
        errors.append([scores.accuracy.standard_error, scores.f1.standard_error, scores.auc.standard_error])
    scatter, told = np.std(values, axis=0), np.sqrt(np.square(errors).mean(0))
    assert told == pytest.approx(scatter, rel=0.1)


def test_copies_within_groups_add_no_certainty() -> None:
    labels, decisions = examples(1)
    single = binary_scores(labels, decisions, alone(labels))
    copied = binary_scores(np.repeat(labels, 4), np.repeat(decisions, 4), np.repeat(alone(labels), 4))
    for name in ("accuracy", "f1", "auc"):
        a, b = getattr(single, name), getattr(copied, name)
        assert b.value == pytest.approx(a.value, abs=1e-12), name
        assert b.standard_error == pytest.approx(a.standard_error, rel=0.03), name
    pretended = binary_scores(np.repeat(labels, 4), np.repeat(decisions, 4), np.arange(4 * len(labels)))
    assert single.auc.standard_error is not None
    assert pretended.auc.standard_error == pytest.approx(0.5 * single.auc.standard_error, rel=0.03)


def obuchowski(labels: np.ndarray, decisions: list[np.ndarray], groups: np.ndarray) -> float:
    """The clustered error, pair by pair (Obuchowski 1997, S10, S01 and S11); of two decisions, that of A − B."""
    sums: dict[int, list[float]] = {group: [0.0, 0.0] for group in groups.tolist()}
    places = [np.flatnonzero(labels).tolist(), np.flatnonzero(~labels).tolist()]
    m, n = map(len, places)
    for values, sign in zip(decisions, (1, -1), strict=False):
        psi = {(i, j): (values[i] > values[j]) + 0.5 * (values[i] == values[j]) for i in places[0] for j in places[1]}
        area = sum(psi.values()) / (m * n)
        for i in places[0]:
            sums[int(groups[i])][0] += sign * (sum(psi[i, j] for j in places[1]) / n - area)
        for j in places[1]:
            sums[int(groups[j])][1] += sign * (sum(psi[i, j] for i in places[0]) / m - area)
    g, g10, g01 = len(sums), len(set(groups[labels])), len(set(groups[~labels]))
    s10 = g10 / ((g10 - 1) * m) * sum(p * p for p, _ in sums.values())
    s01 = g01 / ((g01 - 1) * n) * sum(q * q for _, q in sums.values())
    s11 = g / (g - 1) * sum(p * q for p, q in sums.values())
    return math.sqrt(s10 / m + s01 / n + 2 * s11 / (m * n))


@pytest.mark.parametrize("seed", range(3))
def test_the_error_over_groups_is_obuchowskis(seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 6, 40)
    labels, first = examples(seed, count=40)
    labels = labels & (groups != 2)  # one group has no positive
    second = first + np.round(rng.normal(size=40), 1)
    error = auc(labels, first, groups).standard_error
    assert error == pytest.approx(obuchowski(labels, [first], groups), abs=1e-12)
    difference = auc_difference(labels, first, second, groups)
    assert difference.value == pytest.approx(roc_auc_score(labels, first) - roc_auc_score(labels, second), abs=1e-12)
    assert difference.standard_error == pytest.approx(obuchowski(labels, [first, second], groups), abs=1e-12)


def test_few_groups_have_the_error_that_new_groups_show() -> None:
    """Six texts, each of which shifts its positives: the mean square of the error is the variance over draws."""
    values, errors = [], []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        labels, groups = np.tile([True, False], 30), np.repeat(np.arange(6), 10)
        decisions = rng.normal(size=60) + labels * (0.8 + rng.normal(size=6)[groups])
        estimate = auc(labels, decisions, groups)
        values.append(estimate.value)
        errors.append(estimate.standard_error)
    assert math.sqrt(np.square(errors).mean()) == pytest.approx(np.std(values), rel=0.06)  # 9 % less without G/(G − 1)


def test_the_error_of_a_single_group_is_unknown() -> None:
    labels, decisions = np.array([True, True, False, False]), np.array([3.0, 1.0, 2.0, 0.0])
    for groups in ([0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 2, 2]):
        estimate = auc(labels, decisions, np.array(groups))
        assert (estimate.value, estimate.standard_error) == (0.75, None), groups
        assert str(estimate) == "0.75 ± –"
        assert auc_difference(labels, decisions, -decisions, np.array(groups)).standard_error is None
    assert auc(labels, decisions, np.array([0, 1, 0, 1])).standard_error is not None


def test_perfect_constant_and_inverted_decisions() -> None:
    labels = np.array([True, True, False, False, False])
    perfect = binary_scores(labels, np.where(labels, 2.0, -1.0), alone(labels))
    assert (perfect.accuracy.value, perfect.f1.value, perfect.auc.value) == (1, 1, 1)
    assert perfect.auc.standard_error == 0
    assert binary_scores(labels, np.full(5, -1.0), alone(labels)).f1.value == 0
    assert binary_scores(labels, np.full(5, -1.0), alone(labels)).auc.value == 0.5
    assert binary_scores(labels, np.where(labels, -2.0, 1.0), alone(labels)).auc.value == 0
    nothing = binary_scores(np.zeros(3, dtype=bool), np.full(3, -1.0), np.arange(3))
    assert nothing.f1.value == 0
    assert nothing.auc.value is None


def test_the_majority_null_knows_only_the_training_labels() -> None:
    labels = np.array([True] * 6 + [False] * 4)
    often = majority_scores(np.array([True, True, False]), labels, np.arange(10))
    rarely = majority_scores(np.array([True, False, False]), labels, np.arange(10))
    assert often.accuracy.value == pytest.approx(0.6)
    assert rarely.accuracy.value == pytest.approx(0.4)
    for null in (often, rarely):
        assert null.f1.value == pytest.approx(2 * 0.6 / 1.6)
        assert null.auc == Estimate(0.5, 0.0)


def test_averages_over_splits_and_classes() -> None:
    def scores(value: float, error: float) -> BinaryScores:
        return BinaryScores(*[Estimate(value, error)] * 3)

    first = over_splits([scores(0.6, 0.02), scores(0.8, 0.04)])
    assert first.auc.value == pytest.approx(0.7)
    assert first.auc.standard_error == pytest.approx(0.03)
    assert first.auc.deviation == pytest.approx(math.sqrt(0.02))
    assert over_splits([scores(0.6, 0.02)]).auc.deviation is None
    both = over_classes([first, over_splits([scores(0.9, 0.01), scores(0.9, 0.01)])])
    assert both.f1.value == pytest.approx(0.8)
    assert both.f1.standard_error == pytest.approx(0.02)
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert mean_and_error([1.0]) == (1.0, None)


def test_an_interval_is_that_of_a_known_error() -> None:
    assert SplitEstimate(0.8, 0.1, 0.02).interval == pytest.approx((0.8 - 0.1959964, 0.8 + 0.1959964), abs=1e-6)
    assert SplitEstimate(0.8, None, None).interval is None
