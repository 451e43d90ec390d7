"""Affine maps by NumPy: least squares, and ridge with its strength chosen on rows held back."""

from __future__ import annotations

import numpy as np


def affine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least squares with a column of ones, by NumPy's singular value decomposition."""
    return np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]


def ridge_by_hand(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Ridge by `np.linalg.solve`, its strength chosen on every fifth run of 64 rows; weights above the constant."""

    def weights(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
        if ridge == np.inf:
            return np.r_[np.zeros((x.shape[1], y.shape[1])), y.mean(0)[None]]
        if ridge == 0:
            return affine(x, y)
        C = np.cov(x.T, bias=True)
        C_xy = (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)
        W = np.linalg.solve(C + ridge * np.trace(C) / len(C) * np.eye(len(C)), C_xy)
        return np.r_[W, (y.mean(0) - x.mean(0) @ W)[None]]

    held_back = np.arange(len(x)) // 64 % 5 == 4
    if held_back.sum() < 32:
        return weights(x, y, np.inf)
    errors = {}
    for ridge in (0, *(10.0**power for power in range(-6, 3)), np.inf):
        chosen = weights(x[~held_back], y[~held_back], ridge)
        errors[ridge] = ((y[held_back] - x[held_back] @ chosen[:-1] - chosen[-1]) ** 2).sum()
    best = next(ridge for ridge, error in errors.items() if error <= 1.01 * min(errors.values()))
    return weights(x, y, best)
