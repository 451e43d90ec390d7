"""The definitions again, slowly, in NumPy, without sums that stream."""

from __future__ import annotations

import numpy as np


def ratio(a: np.ndarray, b: np.ndarray, documents: np.ndarray) -> tuple[float, float]:
    """Σa/Σb and its jackknife standard error: made again without each document."""
    value = a.sum() / b.sum()
    names = sorted(set(documents.tolist()))
    without = np.array([a[documents != name].sum() / b[documents != name].sum() for name in names])
    squares = np.square(without - value).sum()
    return float(value), float(np.sqrt((len(names) - 1) / len(names) * squares))


def bootstrap(a: np.ndarray, b: np.ndarray, documents: np.ndarray, draws: int = 4000) -> float:
    """Standard deviation of Σa/Σb when documents are drawn again with replacement."""
    rng = np.random.default_rng(0)
    names = sorted(set(documents.tolist()))
    sums = np.array([(a[documents == name].sum(), b[documents == name].sum()) for name in names])
    picked = sums[rng.integers(len(names), size=(draws, len(names)))].sum(1)
    return float((picked[:, 0] / picked[:, 1]).std())


def reconstruction(x: np.ndarray, x_hat: np.ndarray, documents: np.ndarray) -> dict[str, tuple[float, float]]:
    """Every reconstruction metric of evaluated tokens."""
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    one = np.ones(len(x))
    error = ((x - x_hat) ** 2).sum(1)
    norm, norm_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    product = (x * x_hat).sum(1)
    fvu = ratio(error, ((x - x.mean(0)) ** 2).sum(1), documents)
    return {
        "mse": ratio(error, one, documents),
        "fvu": fvu,
        "explained_variance": (1 - fvu[0], fvu[1]),
        "cosine": ratio(product / (norm * norm_hat), one, documents),
        "l2_ratio": ratio(norm_hat / norm, one, documents),
        "relative_reconstruction_bias": ratio(norm_hat**2, product, documents),
    }
