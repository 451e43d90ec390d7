"""Logistic regression by scikit-learn on standardised columns, with regularisation chosen on validation examples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from sae.errors import ConfigError
from sae.probing.splits import Split

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""scikit-learn's C: 1 / (weight of ½‖w‖² against the sum of the log losses), for standardised columns."""

Ranking = Literal["difference", "standardised"]


def require_sklearn() -> None:
    """Raise ConfigError if scikit-learn is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ConfigError("probes need scikit-learn, from the package's extra: pip install 'sae[probing]'") from error


@dataclass(frozen=True)
class LinearProbe:
    """Log-odds = x·weights + bias, for columns before standardisation.

    Attributes:
        strength: the chosen C.
    """

    weights: Float[np.ndarray, " columns"]
    bias: float
    strength: float

    def decisions(self, x: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, " rows"]:
        """Log-odds of the positive class."""
        return x.astype(np.float64) @ self.weights + self.bias


class Design:
    """Columns of all examples, prepared for fitting any labels under one split.

    Columns are centred and divided by their standard deviations over the training rows; constant columns become 0. If
    there are more columns than rows to fit, the rows are expressed in an orthonormal basis of their span. This does not
    change any ridge-penalised fit, because the penalty keeps the weights in that span.

    Args:
        x: all examples.
        split: its training and validation rows are fitted; its test rows are not used.
    """

    def __init__(self, x: Float[np.ndarray, "rows columns"], split: Split) -> None:
        self.split = split
        fitted = x[split.fitted].astype(np.float64)
        training = fitted[: len(split.train)]
        self.mean, deviation = training.mean(0), training.std(0)
        self.scale = np.where(deviation > 1e-12 * np.abs(self.mean), deviation, np.inf)
        rows = (fitted - self.mean) / self.scale
        self.basis = _span(rows) if rows.shape[1] > rows.shape[0] else None
        self.rows = rows if self.basis is None else rows @ self.basis

    def fit(self, labels: Bool[np.ndarray, " rows"], *, balanced: bool = False, refit: bool = True) -> LinearProbe:
        """Fit the probe whose C has the lowest validation log loss; ties go to the strongest penalty.

        Args:
            labels: labels of all examples; those of test rows are not used.
            balanced: weight examples so that both classes count equally.
            refit: fit again with that C on training and validation rows together.
        """
        y = labels[self.split.fitted]
        cut = len(self.split.train)
        weights = _balanced(y) if balanced else np.ones(len(y))
        losses = []
        for strength in STRENGTHS:
            w, b = _fit(self.rows[:cut], y[:cut], weights[:cut], strength)
            losses.append(_log_loss(y[cut:], self.rows[cut:] @ w + b, weights[cut:]))
        strength = STRENGTHS[int(np.argmin(losses))]
        stop = len(y) if refit else cut
        w, b = _fit(self.rows[:stop], y[:stop], weights[:stop], strength)
        raw = (w if self.basis is None else self.basis @ w) / self.scale
        return LinearProbe(raw, float(b - self.mean @ raw), strength)


def rank_columns(
    x: Float[np.ndarray, "rows columns"], labels: Bool[np.ndarray, " rows"], ranking: Ranking, *, signed: bool = False
) -> Int[np.ndarray, " columns"]:
    """Columns ranked by the difference of their class means, largest first; ties go to the lower index.

    Gurnee et al. 2023 (§4), Kantamneni et al. 2025 and SAEBench choose neurons and latents this way.

    Args:
        ranking: `standardised` divides by each column's standard deviation, which gives twice the correlation for
            balanced labels.
        signed: rank by the signed difference, larger for the positive class first, instead of the absolute difference.
    """
    x = x.astype(np.float64)
    difference = x[labels].mean(0) - x[~labels].mean(0)
    if ranking == "standardised":
        deviation = x.std(0)
        difference = np.divide(difference, deviation, out=np.zeros_like(difference), where=deviation > 0)
    return np.argsort(-(difference if signed else np.abs(difference)), kind="stable")


def principal_components(
    x: Float[np.ndarray, "rows columns"], training: Int[np.ndarray, " train"], components: int
) -> Float[np.ndarray, "rows components"]:
    """Coordinates of all rows along the leading principal components of the training rows."""
    mean = x[training].astype(np.float64).mean(0)
    centred = x.astype(np.float64) - mean
    _, _, directions = np.linalg.svd(centred[training], full_matrices=False)
    return centred @ directions[:components].T


def _fit(rows: Any, labels: Any, weights: Any, strength: float) -> tuple[np.ndarray, float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the remaining gain is too small to change a decision
        model = LogisticRegression(C=strength, tol=1e-6, max_iter=1000).fit(rows, labels, sample_weight=weights)
    return model.coef_[0], float(model.intercept_[0])


def _log_loss(labels: np.ndarray, decisions: np.ndarray, weights: np.ndarray) -> float:
    losses = np.logaddexp(0, np.where(labels, -decisions, decisions))
    return float((weights * losses).sum() / weights.sum())


def _balanced(labels: Bool[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    share = labels.mean()
    return np.where(labels, 0.5 / share, 0.5 / (1 - share))


def _span(rows: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "columns rank"]:
    """Orthonormal basis of the rows' span, from the eigenvectors of their inner products."""
    values, vectors = np.linalg.eigh(rows @ rows.T)
    if values[-1] <= 0:  # every column is constant
        return np.zeros((rows.shape[1], 1))
    nonzero = values > values[-1] * len(rows) * np.finfo(np.float64).eps
    return rows.T @ (vectors[:, nonzero] / np.sqrt(values[nonzero]))
