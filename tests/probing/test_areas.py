"""Areas of all columns against scikit-learn and pairs counted one by one; shuffles against what groups allow."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sae.probing import areas
from sae.probing.areas import RankedColumns, shuffled_labels


def by_pairs(values: np.ndarray, labels: np.ndarray) -> float:
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a, b in itertools.product(values[labels].tolist(), values[~labels].tolist())
    ]
    return sum(pairs) / len(pairs)


def sparse_columns(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Mostly zeros with ties, as latents are; the last column is constant."""
    x = np.round(np.maximum(rng.normal(size=(rows, columns)) - 0.5, 0), 1).astype(np.float32)
    x[:, -1] = 3.0
    return x


@pytest.mark.parametrize("block", [1 << 21, 100], ids=["one block", "many blocks"])
def test_every_column_s_area_is_scikit_learn_s_and_that_of_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(areas, "NUMBERS_AT_ONCE", block)
    rng = np.random.default_rng(0)
    x = sparse_columns(rng, 37, 11)
    labels = rng.random((5, 37)) < 0.4
    ranked = RankedColumns(x)
    found = ranked.areas(labels)
    for draw, column in itertools.product(range(5), range(11)):
        assert found[draw, column] == pytest.approx(by_pairs(x[:, column], labels[draw]), abs=1e-12)
        assert found[draw, column] == pytest.approx(roc_auc_score(labels[draw], x[:, column]), abs=1e-12)
    chosen = np.array([3, 10, 0, 0, 7])
    np.testing.assert_allclose(ranked.areas_of(labels, chosen), found[np.arange(5), chosen], rtol=0, atol=1e-15)
    assert (found[:, -1] == 0.5).all()


def test_equal_columns_have_equal_areas() -> None:
    """Bit for bit, whatever their scale, so that the lower index wins."""
    rng = np.random.default_rng(1)
    column = rng.normal(size=(501, 1)).astype(np.float32)
    found = RankedColumns(np.concatenate([column, 7 * column, column**3], 1)).areas(rng.random((40, 501)) < 0.3)
    assert (found == found[:, :1]).all()


def test_labels_of_a_mixed_group_are_shuffled_within_it() -> None:
    rng = np.random.default_rng(2)
    groups = np.array([5, 5, 5, 9, 9, 9, 9, 5])
    labels = np.array([True, False, False, True, True, True, False, False])
    drawn = shuffled_labels(labels, groups, rng, 4000)
    assert (drawn[:, groups == 5].sum(1) == 1).all()
    assert (drawn[:, groups == 9].sum(1) == 3).all()
    arrangements = Counter(map(tuple, drawn.tolist()))
    assert len(arrangements) == 16, "one of four places, times one of four places"
    counts = np.array(list(arrangements.values()))
    assert np.square(counts - 250).sum() / 250 < 37.7, "χ² with 15 degrees of freedom, 99.9 %"


def test_groups_of_one_label_exchange_it_as_wholes() -> None:
    rng = np.random.default_rng(3)
    groups = np.array([0, 0, 1, 2, 2, 2, 3])
    labels = np.array([True, True, True, False, False, False, False])
    drawn = shuffled_labels(labels, groups, rng, 3000)
    for group in range(4):
        of_group = drawn[:, groups == group]
        assert (of_group == of_group[:, :1]).all()
    heads = Counter(tuple(np.flatnonzero(row[[0, 2, 3, 6]]).tolist()) for row in drawn)
    assert set(heads) == set(itertools.combinations(range(4), 2)), "any two of the four groups"
    assert all(abs(count - 500) < 5 * np.sqrt(3000 * 5 / 36) for count in heads.values())


def test_single_examples_are_shuffled_freely() -> None:
    labels = np.array([True, False, False])
    drawn = shuffled_labels(labels, np.arange(3), np.random.default_rng(4), 3000)
    assert (drawn.sum(1) == 1).all()
    assert np.allclose(drawn.mean(0), 1 / 3, atol=0.05)
