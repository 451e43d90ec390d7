"""Splits, rankings and fits, beside scikit-learn called directly."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from sae.errors import ConfigError, DataError
from sae.numerics.seeding import numpy_generator
from sae.probing.linear import STRENGTHS, Design, principal_components, rank_columns, require_sklearn
from sae.probing.splits import check_split, split_examples


def planted(count: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels that some columns tell, with noise, on very different scales."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, columns)) * np.exp(rng.normal(size=columns)) + rng.normal(size=columns)
    scores = (x - x.mean(0)) / x.std(0) @ np.r_[2.0, -1.0, np.zeros(columns - 2)]
    return x.astype(np.float32), scores + rng.normal(size=count) > 0


def split_of(labels, seed: int = 0, groups=None):
    names = [str(label) for label in labels]
    groups = np.arange(len(names)) if groups is None else groups
    return split_examples(
        names, groups, test_fraction=0.25, validation_fraction=0.25, rng=numpy_generator("test", seed)
    )


@pytest.mark.parametrize("columns", [3, 300])
def test_fits_are_scikit_learns_at_the_strength_of_least_validation_loss(columns: int) -> None:
    """In fewer dimensions than rows and in more: there the fit is made in the span of the rows."""
    x, y = planted(120, columns)
    split = split_of(y)
    found = Design(x, split).fit(y)

    scaler = StandardScaler().fit(x[split.train].astype(np.float64))
    z = scaler.transform(x.astype(np.float64))

    def direct(strength: float, rows: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, tol=1e-9, max_iter=10_000).fit(z[rows], y[rows])

    losses = [
        log_loss(y[split.validation], direct(strength, split.train).predict_proba(z[split.validation])[:, 1])
        for strength in STRENGTHS
    ]
    assert found.strength == STRENGTHS[int(np.argmin(losses))]
    expected = direct(found.strength, split.fitted).decision_function(z[split.test])
    assert found.decisions(x[split.test]) == pytest.approx(expected, abs=2e-3)
    unrefitted = Design(x, split).fit(y, refit=False)
    expected = direct(found.strength, split.train).decision_function(z[split.test])
    assert unrefitted.decisions(x[split.test]) == pytest.approx(expected, abs=2e-3)


def test_balanced_weights_are_scikit_learns() -> None:
    x, y = planted(200, 4, seed=1)
    y = y & (np.random.default_rng(0).random(200) < 0.3)
    split = split_of(y)
    found = Design(x, split).fit(y, balanced=True, refit=False)
    z = StandardScaler().fit(x[split.train].astype(np.float64)).transform(x.astype(np.float64))
    weights = len(split.fitted) / (2 * np.where(y, y[split.fitted].sum(), (~y[split.fitted]).sum()))
    direct = LogisticRegression(C=found.strength, tol=1e-9, max_iter=10_000)
    direct.fit(z[split.train], y[split.train], sample_weight=weights[split.train])
    assert found.decisions(x[split.test]) == pytest.approx(direct.decision_function(z[split.test]), abs=2e-3)


def test_test_examples_have_no_part_in_choice_or_fit() -> None:
    x, y = planted(100, 150)
    split = split_of(y)
    before = Design(x, split).fit(y)
    components = principal_components(x, split.train, 3)
    x, y = x.copy(), y.copy()
    x[split.test], y[split.test] = 1e6, ~y[split.test]
    after = Design(x, split).fit(y)
    assert after.strength == before.strength
    assert np.array_equal(after.weights, before.weights)
    assert np.array_equal(principal_components(x, split.train, 3)[split.fitted], components[split.fitted])


def test_constant_columns_get_no_weight() -> None:
    x, y = planted(60, 4)
    x[:, 2] = 7.0
    split = split_of(y)
    assert Design(x, split).fit(y).weights[2] == 0
    wide = Design(np.full((60, 200), 3.0), split).fit(y)
    assert np.abs(wide.weights).max() == 0


def test_ranking_by_mean_difference() -> None:
    labels = np.array([True, True, False, False])
    x = np.array([[1.0, 0.0, 9.0, 5.0], [1.0, 0.0, 1.0, 5.0], [0.0, 3.0, 2.0, 5.0], [0.0, 3.0, 0.0, 5.0]])
    assert rank_columns(x, labels, "difference").tolist() == [2, 1, 0, 3]  # differences 1, −3, 4, 0
    assert rank_columns(x, labels, "standardised").tolist() == [0, 1, 2, 3]  # 2, −2, 1.13, 0 deviations
    assert rank_columns(x, labels, "difference", signed=True).tolist() == [2, 0, 3, 1]


def test_the_standardised_difference_is_twice_the_correlation() -> None:
    x, _ = planted(80, 20)
    y = np.arange(80) % 2 == 0
    correlations = np.array([abs(np.corrcoef(column, y)[0, 1]) for column in x.T.astype(np.float64)])
    assert rank_columns(x, y, "standardised").tolist() == np.argsort(-correlations, kind="stable").tolist()


def test_principal_components_are_scikit_learns() -> None:
    x, y = planted(60, 10)
    split = split_of(y)
    expected = PCA(3).fit(x[split.train].astype(np.float64)).transform(x.astype(np.float64))
    found = principal_components(x, split.train, 3)
    assert np.abs(found) == pytest.approx(np.abs(expected), abs=1e-6)


def test_splits_are_stratified_disjoint_and_of_the_asked_size() -> None:
    labels = ["a"] * 80 + ["b"] * 40
    split = split_examples(
        labels, np.arange(120), test_fraction=0.25, validation_fraction=0.15, rng=numpy_generator("test", 3)
    )
    parts = [split.train, split.validation, split.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    assert [(int((part < 80).sum()), int((part >= 80).sum())) for part in parts] == [(48, 24), (12, 6), (20, 10)]
    again = split_examples(
        labels, np.arange(120), test_fraction=0.25, validation_fraction=0.15, rng=numpy_generator("test", 3)
    )
    other = split_examples(
        labels, np.arange(120), test_fraction=0.25, validation_fraction=0.15, rng=numpy_generator("test", 4)
    )
    assert np.array_equal(split.test, again.test)
    assert not np.array_equal(split.test, other.test)


def test_groups_stay_on_one_side() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 300)
    split = split_of(rng.random(300) < 0.5, groups=groups)
    sides = [set(groups[part].tolist()) for part in (split.train, split.validation, split.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]
    assert set.union(*sides) == set(groups.tolist())


def test_too_few_examples_of_a_side() -> None:
    labels = np.array([True] * 6 + [False] * 40)
    with pytest.raises(DataError, match=r"data 'x': 1 test example on one side, expected at least 2: give more"):
        split = split_examples(
            [str(one) for one in labels], np.arange(46), rng=numpy_generator("test"),
            test_fraction=0.2, validation_fraction=0.4,
        )  # fmt: skip
        check_split(split, labels, "data 'x'")


def test_scikit_learn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match=r"probes need scikit-learn.*pip install 'sae\[probing\]'"):
        require_sklearn()
