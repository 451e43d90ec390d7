"""Metrics as ratios of sums over documents; differences with paired standard errors; what an interval covers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sae.evaluation.downstream import DOWNSTREAM_NAMES
from sae.evaluation.metrics import METRICS, below_noise, difference, estimate
from sae.results.estimate import Estimate


def _totals(documents: int = 120, seed: int = 0, quality: float = 1.0) -> dict[str, torch.Tensor]:
    """Sums of documents of 1 to 60 tokens, some harder than others; `quality` scales the error."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 61, documents).astype(float)
    hardness = rng.gamma(3, size=documents)
    own = np.random.default_rng(round(1000 * quality)).normal(1, 0.005, documents)
    error = tokens * hardness * quality * own
    clean = tokens * (2 + hardness / 3)
    columns = {
        "tokens": tokens, "error": error, "deviation": 8 * tokens * (hardness + 0.5), "positions": tokens,
        "clean": clean, "zero": clean + 5 * tokens, "mean": clean + 2 * tokens * hardness,
        "spliced": clean + 0.1 * error,
    }  # fmt: skip
    return {name: torch.from_numpy(np.append(column, 0.0)) for name, column in columns.items()}  # one has no token


def _slow_difference(a: Any, b: Any, other_a: Any, other_b: Any) -> tuple[float, float]:
    """R − R' and its error, one document at a time."""
    value, other = sum(a) / sum(b), sum(other_a) / sum(other_b)
    squares = 0.0
    for i in range(len(a)):
        rest = [number for number in range(len(a)) if number != i]
        here = sum(a[j] for j in rest) / sum(b[j] for j in rest)
        there = sum(other_a[j] for j in rest) / sum(other_b[j] for j in rest)
        squares += ((here - there) - (value - other)) ** 2
    n = len(a)
    return value - other, math.sqrt((n - 1) / n * squares)


def test_differences_equal_a_loop_over_documents() -> None:
    one, other = _totals(quality=1.0), _totals(quality=0.9)
    present = {name: column[:-1].tolist() for name, column in one.items()}
    there = {name: column[:-1].tolist() for name, column in other.items()}
    expected = {
        "mse": _slow_difference(present["error"], present["tokens"], there["error"], there["tokens"]),
        "fvu": _slow_difference(present["error"], present["deviation"], there["error"], there["deviation"]),
        "ce_recovered_mean": _slow_difference(
            *([x - y for x, y in zip(part["mean"], part[name], strict=True)] for part in (present, there)
              for name in ("spliced", "clean"))
        ),
    }  # fmt: skip
    for name, (value, error) in expected.items():
        found = difference(name, one, other)
        assert found is not None
        assert found.value == pytest.approx(value, rel=1e-10), name
        assert found.standard_error == pytest.approx(error, rel=1e-10), name
    explained, unexplained = difference("explained_variance", one, other), difference("fvu", one, other)
    assert explained is not None and unexplained is not None and unexplained.value is not None
    assert explained.value == pytest.approx(-unexplained.value, rel=1e-9)
    assert explained.standard_error == unexplained.standard_error


def test_paired_errors_are_those_of_the_bootstrap_and_far_below_unpaired_ones() -> None:
    one, other = _totals(quality=1.0), _totals(quality=0.97)
    found = difference("fvu", one, other)
    assert found is not None and found.standard_error is not None
    rng = np.random.default_rng(1)
    columns = torch.stack([one["error"], one["deviation"], other["error"], other["deviation"]])[:, :-1].numpy()
    drawn = columns[:, rng.integers(120, size=(4000, 120))].sum(-1)
    assert found.standard_error == pytest.approx(float((drawn[0] / drawn[1] - drawn[2] / drawn[3]).std()), rel=0.1)
    alone = [estimate("fvu", part).standard_error or 0 for part in (one, other)]
    assert found.standard_error < math.hypot(*alone) / 4


def test_noise_is_what_the_95_percent_interval_holds() -> None:
    for value in (0.0195, -0.0195):
        assert below_noise(Estimate(value, 0.01)) and not below_noise(Estimate(1.01 * value, 0.01))
    for value in (0.0277, -0.0277):  # t of 4 degrees of freedom: 2.776
        assert below_noise(Estimate(value, 0.01, 4.0)) and not below_noise(Estimate(1.01 * value, 0.01, 4.0))
    assert below_noise(Estimate(0.0, 0.0)), "the same numbers"
    assert not below_noise(Estimate(0.1, None)), "nobody knows"
    assert below_noise(Estimate(0.0, None)), "but here"
    one = _totals()
    assert difference("fvu", one, one) == Estimate(0.0, 0.0)


def test_there_is_no_difference_where_nothing_can_be_paired() -> None:
    one, other = _totals(), _totals(quality=0.9)
    assert difference("kl", one, other) is None, "nobody measured it"
    fewer = {**other, "tokens": other["tokens"] - 1}
    assert difference("fvu", one, fewer) is None, "other tokens"
    assert difference("delta_ce", one, fewer) is not None, "the same positions"
    single = {name: torch.tensor([1.0, 0.0]).double() for name in one}
    assert difference("mse", single, single) == Estimate(0.0, None)


def test_every_language_model_metric_has_a_ratio() -> None:
    assert set(DOWNSTREAM_NAMES) <= set(METRICS)


POPULATION = 5000


def _population(seed: int = 3) -> dict[str, torch.Tensor]:
    """Documents of very uneven lengths whose tokens agree with each other: a document's level, and a walk inside it."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4, 0.9, POPULATION), 4, 2000).astype(int)
    level = rng.gamma(4, 0.25, POPULATION)
    rows = []
    for length, mean in zip(lengths, level, strict=True):
        noise = rng.normal(size=length)
        for place in range(1, length):  # neighbouring tokens correlate by 0.9
            noise[place] = 0.9 * noise[place - 1] + math.sqrt(1 - 0.81) * noise[place]
        deviation = np.exp(0.3 * noise) * (0.5 + mean)
        error = deviation * mean * 0.2 * np.exp(0.3 * rng.normal(size=length))
        rows.append((length, error.sum(), deviation.sum()))
    columns = np.array(rows, dtype=float).T
    return dict(zip(("tokens", "error", "deviation"), map(torch.from_numpy, columns), strict=True))


@pytest.mark.parametrize("metric", ["mse", "fvu"])
def test_the_95_percent_interval_covers_the_full_value_in_92_to_98_percent_of_samples(metric: str) -> None:
    """Two hundred samples of 150 documents out of 5,000; tokens taken for independent would cover far less often."""
    population = _population()
    truth = estimate(metric, population).value
    assert truth is not None
    rng = np.random.default_rng(0)
    covered = as_if_independent = 0
    for _ in range(200):
        drawn = torch.from_numpy(rng.choice(POPULATION, 150, replace=False))
        sample = {name: column[drawn] for name, column in population.items()}
        made = estimate(metric, sample)
        assert made.value is not None and made.standard_error is not None
        assert made.interval is not None
        covered += made.interval[0] <= truth <= made.interval[1]
        effective = math.sqrt(150 / float(sample["tokens"].sum()))
        as_if_independent += abs(made.value - truth) <= 1.96 * made.standard_error * effective
    assert 184 <= covered <= 196, f"{covered / 2:.1f} %"
    assert as_if_independent < 100


def test_the_interval_of_a_paired_difference_covers_as_often() -> None:
    population = _population()
    rng = np.random.default_rng(2)
    other = {**population, "error": population["error"] * torch.from_numpy(rng.normal(1.05, 0.1, POPULATION))}
    truth = difference("fvu", other, population)
    assert truth is not None and truth.value is not None
    covered = 0
    for _ in range(200):
        drawn = torch.from_numpy(rng.choice(POPULATION, 150, replace=False))
        samples = ({name: column[drawn] for name, column in part.items()} for part in (other, population))
        made = difference("fvu", *samples)
        assert made is not None and made.interval is not None
        covered += made.interval[0] <= truth.value <= made.interval[1]
    assert 184 <= covered <= 196, f"{covered / 2:.1f} %"
