"""Recovery of known features: exact cases, brute force, and what chance gives."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from sae.architectures import ReLU
from sae.errors import ConfigError, ShapeError
from sae.evaluation.recovery import (
    UNMATCHED,
    Labelled,
    Matching,
    best_thresholds,
    by_group,
    cosines,
    detection,
    firing_density,
    match,
    measure_recovery,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected_null(count: int, d: int) -> float:
    """E max cosine to `count` random directions in d dimensions: (cos + 1)/2 ~ Beta((d−1)/2, (d−1)/2)."""
    half = (d - 1) / 2
    value, _ = integrate.quad(
        lambda c: 1 - stats.beta.cdf((c + 1) / 2, half, half) ** count, -1, 1, points=[0], limit=400
    )
    return value - 1


@pytest.mark.parametrize(("count", "d", "known"), [(5, 2, 0.80), (512, 256, 0.19)])
def test_random_directions_score_what_chance_gives(count: int, d: int, known: float) -> None:
    """So a mean max cosine says nothing without its null. Bounds are four standard errors over the worlds."""
    exact = expected_null(count, d)
    assert exact == pytest.approx(known, abs=0.01)
    worlds = 10 if count > 100 else 200
    nulls = [
        measure_recovery(normal(count, d), normal(count, d, seed=seed), null_draws=1, seed=seed).null
        for seed in range(1, worlds + 1)
    ]
    for name in ("mean_max_cosine_true", "mean_max_cosine_learned"):
        scores = [getattr(null, name) for null in nulls]
        error = np.std(scores, ddof=1) / worlds**0.5
        assert error < 0.015 and abs(np.mean(scores) - exact) < 4 * error, name
    assert all(null.matched_cosine <= null.mean_max_cosine_true + 1e-12 for null in nulls)


def test_the_null_is_not_what_is_scored() -> None:
    """Whatever seed the true directions are from, the null's are others."""
    for seed in range(3):
        true = normal(30, 20, seed=seed)
        scored = measure_recovery(true, true, seed=seed)
        assert scored.scores.matched_cosine == pytest.approx(1)
        assert scored.null.matched_cosine < 0.6


def test_the_same_directions_in_another_order_and_length_are_recovered() -> None:
    true = normal(20, 12)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    found = measure_recovery(torch.rand(20, 1) * true[order] + 0, true)
    assert found.matching.learned.tolist() == order.argsort().tolist()
    for number in (
        found.scores.mean_max_cosine_true,
        found.scores.mean_max_cosine_learned,
        found.scores.matched_cosine,
        *found.scores.recall.values(),
        *found.scores.precision.values(),
    ):
        assert number == pytest.approx(1)


def test_the_opposite_direction_is_another_one() -> None:
    true = torch.eye(6)
    found = measure_recovery(-true, true)
    assert found.scores.mean_max_cosine_true == 0
    assert not any(found.scores.recall.values())


def test_copies_count_once() -> None:
    """Four learned features on two of three true ones: recall 2/3, precision 2/4."""
    true = torch.eye(3)
    learned = torch.stack([true[0], true[0], 3 * true[1], true[1]])
    found = measure_recovery(learned, true)
    assert found.scores.recall[0.9] == pytest.approx(2 / 3)
    assert found.scores.precision[0.9] == pytest.approx(2 / 4)
    assert found.scores.mean_max_cosine_learned == pytest.approx(1)
    assert found.scores.mean_max_cosine_true == pytest.approx(2 / 3)
    assert found.matching.cosine[2] == 0


def test_features_that_do_not_count_are_left_out() -> None:
    true = torch.eye(4)
    learned = torch.cat([true, torch.zeros(1, 4), -torch.ones(1, 4)])
    live = torch.tensor([True, False, True, True, True, False])
    found = measure_recovery(learned, true, live)
    assert (found.true, found.live) == (4, 3)
    assert found.matching.learned.tolist() == [0, UNMATCHED, 2, 3]
    assert found.scores.precision[0.9] == 1 and found.scores.recall[0.9] == 3 / 4
    none = measure_recovery(torch.zeros(2, 4), true)
    assert none.live == 0 and none.scores == none.null and none.scores.matched_cosine == 0


def test_matching_is_the_best_of_all_permutations() -> None:
    """Where the greedy choice is not."""
    cosine = torch.tensor([[0.9, 0.8], [0.85, 0.1]], dtype=torch.float64)
    assert match(cosine).learned.tolist() == [1, 0]
    for seed in range(5):
        cosine = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        best = max(
            sum(float(cosine[i, j]) for i, j in enumerate(chosen)) for chosen in itertools.permutations(range(6), 5)
        )
        assert float(match(cosine).cosine.sum()) == pytest.approx(best)
        turned = match(cosine.T.contiguous())
        assert float(turned.cosine.sum()) == pytest.approx(best)
        assert int((turned.learned == UNMATCHED).sum()) == 1


def test_cosines_against_numpy() -> None:
    a, b = normal(3, 7), normal(4, 7, seed=1)
    a[1] = 0
    for i, j in itertools.product(range(3), range(4)):
        x, y = a[i].numpy(), b[j].numpy()
        expected = 0 if i == 1 else np.dot(x, y) / math.sqrt(np.dot(x, x) * np.dot(y, y))
        assert float(cosines(a, b)[i, j]) == pytest.approx(float(expected), abs=1e-6)


def slow_f1(activations: np.ndarray, present: np.ndarray, threshold: float) -> float:
    fires = activations > threshold
    hits = int((fires & present).sum())
    return 2 * hits / max(int(fires.sum()) + int(present.sum()), 1)


def test_thresholds_have_the_largest_f1_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    activations = (torch.randint(-3, 6, (60, 8), generator=generator) / 2).relu()  # with ties and zeros
    present = torch.rand(60, 8, generator=generator) < 0.3
    activations[:, 6] = 0
    present[:, 7] = False
    thresholds = best_thresholds(activations, present)
    assert thresholds[6] == torch.inf
    for column in range(8):
        a, y = activations[:, column].numpy(), present[:, column].numpy()
        possible = [0.0, *sorted(set(a.tolist()))]
        best = max(slow_f1(a, y, threshold) for threshold in possible)
        assert slow_f1(a, y, float(thresholds[column])) == pytest.approx(best), column
        assert float(thresholds[column]) not in a[a > 0], "halfway between values"


class Case:
    """Six features on the axes of a space, a dictionary that has them in another order, and noise on one."""

    def __init__(self) -> None:
        self.dictionary = ReLU(6, 6).requires_grad_(False)
        self.order = [2, 0, 1, 5, 3, 4]
        self.dictionary.W_dec.copy_(torch.eye(6)[self.order])
        self.dictionary.W_enc.copy_(self.dictionary.W_dec.T)

    def sample(self, seed: int, rows: int = 4000) -> Labelled:
        generator = torch.Generator().manual_seed(seed)
        values = torch.rand(rows, 6, generator=generator) * (torch.rand(rows, 6, generator=generator) < 0.2)
        noisy = values.clone()
        noisy[:, 5] += 0.5 * torch.rand(rows, generator=generator)  # on top of feature 5, whether it is there or not
        values[:, 4] = 0  # never there
        noisy[:, 4] = 0
        return Labelled(noisy, values > 0)


def test_detection() -> None:
    case = Case()
    validation, test = case.sample(0), case.sample(1)
    matching = measure_recovery(case.dictionary.W_dec, torch.eye(6)).matching
    assert [case.order[j] for j in matching.learned.tolist()] == list(range(6))
    told = detection(case.dictionary, matching, validation, test)
    assert told.occurrences.tolist() == test.present.sum(0).tolist()
    assert told.f1[:4].tolist() == pytest.approx([1] * 4, abs=0.005)
    assert told.f1[4] == 0 and told.occurrences[4] == 0
    assert told.mean(told.f1) == pytest.approx(float(told.f1[[0, 1, 2, 3, 5]].mean()))
    a, y = validation.activations[:, 5].numpy(), validation.present[:, 5].numpy()
    threshold = max(np.linspace(0, 1.5, 3001), key=lambda t: slow_f1(a, y, t))
    b, z = test.activations[:, 5].numpy(), test.present[:, 5].numpy()
    assert float(told.f1[5]) == pytest.approx(slow_f1(b, z, float(threshold)), abs=0.01)
    assert 0.4 < float(told.f1[5]) < 0.9
    p, r = float(told.precision[5]), float(told.recall[5])
    assert float(told.f1[5]) == pytest.approx(2 * p * r / (p + r))


def test_detection_by_another_features_latent_is_chance() -> None:
    """At best it fires on a share s of rows whatever is there: F1 = 2ps/(p + s), at most 2p/(1 + p)."""
    case = Case()
    told = detection(
        case.dictionary, measure_recovery(case.dictionary.W_dec, torch.eye(6)).matching, case.sample(0), case.sample(1)
    )
    assert (told.null_f1[[0, 1, 2, 3, 5]] < 2 * 0.2 / 1.2 + 0.05).all(), told.null_f1
    assert told.mean(told.null_f1) > 0.05


def test_unmatched_features_are_not_detected() -> None:
    case = Case()
    matching = measure_recovery(case.dictionary.W_dec[:3], torch.eye(6)).matching
    told = detection(case.dictionary, matching, case.sample(0), case.sample(1))
    assert told.f1.tolist() == pytest.approx([1, 1, 1, 0, 0, 0], abs=0.005)
    one = Matching(torch.tensor([0, -1]), torch.ones(2, dtype=torch.float64))
    with pytest.raises(ConfigError, match="1 matched features: detection needs two"):
        detection(case.dictionary, one, case.sample(0), case.sample(1))


def test_firing_density() -> None:
    case = Case()
    test = case.sample(1, rows=9000)
    expected = (test.activations > 0).double().mean(0)[case.order]
    torch.testing.assert_close(firing_density(case.dictionary, test.activations), expected)


def test_groups_are_by_rank() -> None:
    order, numbers = torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert by_group(order, numbers, groups=2) == [pytest.approx((0.8, 3.0)), pytest.approx((0.3, 2.0))]
    assert len(by_group(order, numbers)) == 4


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ShapeError, match=r"learned directions \[3, 4\], true ones \[3, 5\]: expected some of one width"
    ):
        measure_recovery(normal(3, 4), normal(3, 5))
    with pytest.raises(ShapeError, match=r"true ones \[0, 4\]"):
        measure_recovery(normal(3, 4), normal(0, 4))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match=r"matching features needs scipy: pip install 'sae\[evaluation\]'"):
        measure_recovery(normal(3, 4), normal(3, 4))
