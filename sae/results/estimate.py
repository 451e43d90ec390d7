"""Means and ratios over tokens, with standard errors over documents, from sums per document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.results.table import NONE

TOKENS = "tokens"


@dataclass(frozen=True)
class Estimate:
    """A mean or a ratio over tokens.

    Attributes:
        value: None if undefined (0/0).
        standard_error: over documents; None if there are fewer than two.
        degrees_of_freedom: of the standard error; None if the error is taken as known.
    """

    value: float | None
    standard_error: float | None
    degrees_of_freedom: float | None = field(default=None, compare=False)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval, value ± t · standard_error with Student's t; None if either is unknown."""
        if self.value is None or self.standard_error is None:
            return None
        half = student_t(self.degrees_of_freedom) * self.standard_error
        return self.value - half, self.value + half

    def to_json(self) -> dict[str, float | None]:
        lower, upper = self.interval or (None, None)
        return {
            "value": self.value,
            "standard_error": self.standard_error,
            "degrees_of_freedom": self.degrees_of_freedom,
            "lower": lower,
            "upper": upper,
        }

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Estimate:
        """Read an estimate that `to_json` wrote.

        Raises:
            KeyError, TypeError: the record is not an estimate.
        """
        numbers = [record[name] for name in ("value", "standard_error", "degrees_of_freedom")]
        if any(type(number) not in (int, float, type(None)) for number in numbers):
            raise TypeError(f"an estimate consists of numbers, not {numbers}")
        return Estimate(*numbers)

    def __str__(self) -> str:
        """`0.1234 ± 0.0012`: the standard error to two digits, and the value to the same decimal place."""
        return NONE if self.value is None else " ± ".join(self._texts(self.value))

    def short(self, width: int = 7) -> str:
        """The value alone, without digits below its error; at most `width` characters if one digit of it fits."""
        if self.value is None:
            return NONE
        value, _ = self._texts(self.value)
        shorter = (f"{self.value:.{digits}g}" for digits in (3, 2, 1))
        return next((text for text in (value, *shorter) if len(text) <= width), value)

    def _texts(self, value: float) -> tuple[str, str]:
        """The value and its error as text."""
        error = self.standard_error
        if error is None or error <= 1e-9 * abs(value):
            return _short(value), NONE if error is None else "0"
        decimals = 1 - math.floor(math.log10(error))
        if decimals > 7:
            digits = max(0, math.floor(math.log10(abs(value) or error)) + decimals)
            return f"{value:.{digits}e}", f"{error:.1e}"
        return f"{value:,.{max(decimals, 0)}f}", f"{error:,.{max(decimals, 0)}f}"


def error_note(evaluated: Mapping[str, Any]) -> str:
    """What ± means in a table, or why there is none.

    Args:
        evaluated: `documents`, and `downstream_documents` if losses of the language model were measured.
    """
    if evaluated["documents"] < 2:
        return (
            "no standard errors (–): they are over documents, and the held-out text has only one; harvest more of it, "
            "or with data.holdout_by=section"
        )
    note = "± standard error over documents"
    if evaluated.get("downstream_documents") == 1:
        return f"{note}; losses are of one document and have none (–): raise evaluation.downstream_tokens"
    return note


class DocumentSums:
    """Running float64 sums of per-token numbers, one row per document.

    Args:
        documents: number of documents; tokens refer to theirs by index.
        names: names of the summed numbers. The number of tokens is always kept, as `tokens`.
    """

    def __init__(self, documents: int, names: Sequence[str]) -> None:
        self.names = (TOKENS, *names)
        self._sums = torch.zeros(documents, len(self.names), dtype=torch.float64)

    def add_(self, documents: Int[Tensor, " rows"], values: dict[str, Float[Tensor, " rows"]]) -> None:
        """Add tokens, given the document index of each and its numbers by name."""
        assert tuple(values) == self.names[1:], (tuple(values), self.names)
        columns = [
            torch.ones(len(documents), dtype=torch.float64),
            *(value.cpu().double() for value in values.values()),
        ]
        self._sums.index_add_(0, documents.cpu(), torch.stack(columns, 1))

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, for `load_state_dict`."""
        return {"sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from sums of the same documents and names."""
        self._sums.copy_(state["sums"])

    @property
    def tokens(self) -> int:
        """Tokens added."""
        return int(self._sums[:, 0].sum())

    @property
    def documents(self) -> int:
        """Documents that have a token."""
        return int((self._sums[:, 0] > 0).sum())

    def __getitem__(self, name: str) -> Float[Tensor, " documents"]:
        """Sums of one number, for each document that has a token."""
        return self._sums[self._sums[:, 0] > 0, self.names.index(name)]

    def totals(self, **renamed: str) -> dict[str, Float[Tensor, " documents"]]:
        """All sums by name, for all documents; with `new="old"`, only the sums named, under their new names."""
        columns = {name: self._sums[:, number].clone() for number, name in enumerate(self.names)}
        return {new: columns[old] for new, old in renamed.items()} if renamed else columns

    def mean(self, name: str) -> Estimate:
        """Mean over tokens."""
        return ratio(self[name], self[TOKENS])


def ratio(numerator: Float[Tensor, " documents"], denominator: Float[Tensor, " documents"]) -> Estimate:
    """R = Σa/Σb over documents, with its delete-one jackknife standard error.

    Documents are the independent draws; tokens of one document are not. Without document i, R is lower by
    d_i = (a_i − R b_i) / (Σb − b_i), and with n documents SE = √((n−1)/n · Σd_i²) (Cochran 1977, "Sampling
    Techniques", ch. 6). If b_i counts tokens, R is the mean over tokens. a and b come from the same documents, and the
    error includes their covariance.

    The degrees of freedom are Satterthwaite's for a sum of squares whose terms have variances proportional to b_i², as
    when all tokens of a document are alike: (Σb²)²/Σb⁴, at most n − 1. A few long documents among short ones are a
    small sample, however many documents there are.
    """
    total = float(denominator.sum())
    if total == 0:
        return Estimate(None, None)
    value = float(numerator.sum()) / total
    return Estimate(value, *jackknife(left_out(numerator, denominator), denominator))


def left_out(
    numerator: Float[Tensor, " documents"], denominator: Float[Tensor, " documents"]
) -> Float[Tensor, " documents"]:
    """The decrease of Σa/Σb when each document is left out; not finite if nothing remains."""
    total = denominator.sum()
    return (numerator - numerator.sum() / total * denominator) / (total - denominator)


def jackknife(
    lower: Float[Tensor, " documents"], *denominators: Float[Tensor, " documents"]
) -> tuple[float | None, float | None]:
    """Standard error and degrees of freedom of an estimate, from its decrease when each document is left out.

    Args:
        lower: the decrease without each document.
        denominators: those of the estimate's ratios; the one with the fewest degrees of freedom counts.

    Returns:
        None and None if there are fewer than two documents, or if one of them holds everything.
    """
    n = len(lower)
    if n < 2 or not bool(lower.isfinite().all()):
        return None, None
    squares = [denominator.square() for denominator in denominators]
    degrees = min(float(square.sum().square() / square.square().sum()) for square in squares)
    return math.sqrt((n - 1) / n * float(lower.square().sum())), min(max(degrees, 1.0), n - 1.0)


def student_t(degrees_of_freedom: float | None) -> float:
    """The 97.5 % quantile of Student's t, or of the normal distribution if there are no degrees of freedom.

    Computed by its expansion in 1/ν (Abramowitz & Stegun 1964, 26.7.5): a tenth below the exact quantile at ν = 1, 1 %
    below at ν = 2, and indistinguishable from it for ν ≥ 4.
    """
    z = 1.959963984540054
    if degrees_of_freedom is None:
        return z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees_of_freedom**power for power, term in enumerate(terms, 1))


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its own device, or on the CPU if the device has no float64 (mps)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def row_sums(tensor: Float[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    """Row sums in float64, on the device that `double` uses, without a float64 copy of the tensor."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).sum(-1, dtype=torch.float64)


def estimate_names(scores: type) -> list[str]:
    """The fields of a class of results that are estimates."""
    return [field.name for field in dataclasses.fields(scores) if field.type in (Estimate, Estimate.__name__)]


def to_json(scores: Any) -> dict[str, Any]:
    """The estimates of a result, for JSON."""
    return {name: getattr(scores, name).to_json() for name in estimate_names(type(scores))}


def _short(value: float) -> str:
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3g}"
