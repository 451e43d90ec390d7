"""Rank correlation, with a bootstrap over groups and a null that is shuffled within groups."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sae.numerics.seeding import numpy_generator

BOOTSTRAPS, SHUFFLES = 1000, 200


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks; equal numbers share their mean rank."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def with_error(score: Callable[[np.ndarray, np.ndarray], float], a: np.ndarray, b: np.ndarray, passage: np.ndarray):
    """A score, and its standard deviation over bootstraps of passages."""
    groups = [np.flatnonzero(passage == number) for number in np.unique(passage)]
    draw = numpy_generator("benchmark: bootstrap", 0)
    scores = []
    for _ in range(BOOTSTRAPS):
        index = np.concatenate([groups[number] for number in draw.integers(len(groups), size=len(groups))])
        scores.append(score(a[index], b[index]))
    return {"value": score(a, b), "standard_error": float(np.std(scores, ddof=1))}


def shuffled(a: np.ndarray, b: np.ndarray, passage: np.ndarray) -> dict[str, float]:
    """Mean and middle 95 % of the score if b is shuffled within passages."""
    draw = numpy_generator("benchmark: shuffles", 0)
    scores = []
    for _ in range(SHUFFLES):
        order = np.lexsort([draw.random(len(b)), passage])
        mixed = np.empty_like(b)
        mixed[np.lexsort([np.arange(len(b)), passage])] = b[order]
        scores.append(spearman(a, mixed))
    low, high = np.percentile(scores, [2.5, 97.5]).tolist()
    return {"mean": float(np.mean(scores)), "low": low, "high": high}
