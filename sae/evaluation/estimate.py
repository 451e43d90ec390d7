"""Sums per document in; means and ratios over tokens with standard errors over documents out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

TOKENS = "tokens"


@dataclass(frozen=True)
class Estimate:
    """A mean or a ratio over tokens.

    Attributes:
        value: None where it is undefined (0/0).
        standard_error: over documents; None where there are fewer than two.
    """

    value: float | None
    standard_error: float | None

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "standard_error": self.standard_error}

    def __str__(self) -> str:
        """`0.1234 ± 0.0012`: two digits of the standard error, and the value to the same place."""
        if self.value is None:
            return "–"
        error = self.standard_error
        if error is None or error <= 1e-9 * abs(self.value):
            return f"{_short(self.value)} ± {'–' if error is None else '0'}"
        decimals = 1 - math.floor(math.log10(error))
        if decimals > 7:
            digits = max(0, math.floor(math.log10(abs(self.value) or error)) + decimals)
            return f"{self.value:.{digits}e} ± {error:.1e}"
        return f"{self.value:,.{max(decimals, 0)}f} ± {error:,.{max(decimals, 0)}f}"


class DocumentSums:
    """Running float64 sums of per-token numbers, one row per document.

    Args:
        documents: how many documents there are; token statistics name theirs by index.
        names: the numbers that are summed. The count of tokens is always kept, as `tokens`.
    """

    def __init__(self, documents: int, names: Sequence[str]) -> None:
        self.names = (TOKENS, *names)
        self._sums = torch.zeros(documents, len(self.names), dtype=torch.float64)

    def add_(self, documents: Int[Tensor, " rows"], values: dict[str, Float[Tensor, " rows"]]) -> None:
        """Add tokens: the document of each, and its numbers by name."""
        assert tuple(values) == self.names[1:], (tuple(values), self.names)
        columns = [
            torch.ones(len(documents), dtype=torch.float64),
            *(value.cpu().double() for value in values.values()),
        ]
        self._sums.index_add_(0, documents.cpu(), torch.stack(columns, 1))

    @property
    def tokens(self) -> int:
        """Tokens added."""
        return int(self._sums[:, 0].sum())

    @property
    def documents(self) -> int:
        """Documents that have a token."""
        return int((self._sums[:, 0] > 0).sum())

    def __getitem__(self, name: str) -> Float[Tensor, " documents"]:
        """Sums of one number, over each document that has a token."""
        return self._sums[self._sums[:, 0] > 0, self.names.index(name)]

    def totals(self, **renamed: str) -> dict[str, Float[Tensor, " documents"]]:
        """All sums by name, over all documents; `new="old"` takes one under another name, and leaves the others out."""
        columns = {name: self._sums[:, number].clone() for number, name in enumerate(self.names)}
        return {new: columns[old] for new, old in renamed.items()} if renamed else columns

    def mean(self, name: str) -> Estimate:
        """Mean over tokens."""
        return ratio(self[name], self[TOKENS])


def ratio(numerator: Float[Tensor, " documents"], denominator: Float[Tensor, " documents"]) -> Estimate:
    """R = Σa/Σb over documents, with the standard error of a ratio of cluster totals.

    Documents are the independent draws; tokens of one document are not. With n documents,
    SE = √(n/(n−1) · Σ(a_i − R b_i)²) / |Σb|: the linearised ("delta method") variance of a ratio estimator
    (Cochran 1977, "Sampling Techniques", ch. 6). Where b_i counts tokens, R is the mean over tokens. a and b come from
    the same documents, and their covariance is part of it.
    """
    total = float(denominator.sum())
    if total == 0:
        return Estimate(None, None)
    value = float(numerator.sum()) / total
    n = len(numerator)
    if n < 2:
        return Estimate(value, None)
    residuals = numerator - value * denominator
    return Estimate(value, math.sqrt(n / (n - 1) * float(residuals.square().sum())) / abs(total))


def double(tensor: Tensor) -> Tensor:
    """As float64: where it is, or on the CPU where the device has no float64 (mps)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def row_sums(tensor: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """Sums of rows in float64, where `double` has it, without a copy of everything in it."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).sum(-1, dtype=torch.float64)


def to_json(scores: Any, names: Sequence[str]) -> dict[str, Any]:
    """The named estimates of a result."""
    return {name: getattr(scores, name).to_json() for name in names}


def _short(value: float) -> str:
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3g}"
