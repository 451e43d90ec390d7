"""Metrics as ratios of sums over documents: their estimates, and differences between two dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.results.estimate import TOKENS, Estimate, jackknife, left_out, ratio

POSITIONS = "positions"
"""Counts the tokens whose language-model losses were measured; `tokens` counts those of all other metrics."""

Totals = Mapping[str, Tensor]
"""Float64 sums `[documents]` by name, for all documents of the split; 0 for those without a token."""


@dataclass(frozen=True)
class Ratio:
    """Σ numerator / Σ denominator over documents.

    Attributes:
        numerator: a sum's name, or `a-b` for the difference of two.
        denominator: likewise.
        complement: the metric is 1 minus the ratio.
        count: the sum that tells which documents have a token.
    """

    numerator: str
    denominator: str
    complement: bool = False
    count: str = TOKENS


METRICS = {
    "mse": Ratio("error", TOKENS),
    "fvu": Ratio("error", "deviation"),
    "explained_variance": Ratio("error", "deviation", complement=True),
    "cosine": Ratio("cosine", "nonzero"),
    "l2_ratio": Ratio("l2_ratio", "nonzero"),
    "relative_reconstruction_bias": Ratio("power", "product"),
    "l0": Ratio("l0", TOKENS),
    "l1": Ratio("l1", TOKENS),
    "ce_clean": Ratio("clean", POSITIONS, count=POSITIONS),
    "ce_spliced": Ratio("spliced", POSITIONS, count=POSITIONS),
    "ce_zero": Ratio("zero", POSITIONS, count=POSITIONS),
    "ce_mean": Ratio("mean", POSITIONS, count=POSITIONS),
    "delta_ce": Ratio("spliced-clean", POSITIONS, count=POSITIONS),
    "ce_recovered_zero": Ratio("zero-spliced", "zero-clean", count=POSITIONS),
    "ce_recovered_mean": Ratio("mean-spliced", "mean-clean", count=POSITIONS),
    "kl": Ratio("kl", POSITIONS, count=POSITIONS),
}


def estimate(metric: str, totals: Totals) -> Estimate:
    """A metric and its standard error over documents."""
    numerator, denominator = _terms(METRICS[metric], totals)
    quotient = ratio(numerator, denominator)
    if METRICS[metric].complement and quotient.value is not None:
        return Estimate(1 - quotient.value, quotient.standard_error, quotient.degrees_of_freedom)
    return quotient


def difference(metric: str, totals: Totals, reference: Totals) -> Estimate | None:
    """How much larger a metric is than in a reference that was evaluated on the same tokens.

    With R = Σa/Σb, and R' = Σa'/Σb' for the reference, the standard error is the jackknife's of R − R': a document is
    left out of both at once, so that difficulty common to both cancels (Miller 2024, "Adding Error Bars to Evals").

    Returns:
        None if one of them has not measured the metric, or not on the same tokens.
    """
    kind = METRICS[metric]
    if not _has(kind, totals) or not _has(kind, reference):
        return None
    if not torch.equal(totals[kind.count], reference[kind.count]):
        return None
    ours, theirs = estimate(metric, totals), estimate(metric, reference)
    if ours.value is None or theirs.value is None:
        return Estimate(None, None)
    (a, b), (other_a, other_b) = _terms(kind, totals), _terms(kind, reference)
    uncertainty = jackknife(left_out(a, b) - left_out(other_a, other_b), b, other_b)
    return Estimate(ours.value - theirs.value, *uncertainty)


def below_noise(difference: Estimate) -> bool:
    """Whether there is no difference at all, or 0 lies in its 95 % interval."""
    if difference.interval is None:
        return difference.value == 0
    return difference.value == 0 or difference.interval[0] < 0 < difference.interval[1]


def _has(kind: Ratio, totals: Totals) -> bool:
    names = (*kind.numerator.split("-"), *kind.denominator.split("-"), kind.count)
    return all(name in totals for name in names)


def _terms(kind: Ratio, totals: Totals) -> tuple[Float[Tensor, " documents"], Float[Tensor, " documents"]]:
    """Numerator and denominator of the documents that have a token."""
    present = totals[kind.count] > 0
    return _term(kind.numerator, totals)[present], _term(kind.denominator, totals)[present]


def _term(name: str, totals: Totals) -> Float[Tensor, " documents"]:
    first, _, second = name.partition("-")
    return totals[first] - totals[second] if second else totals[first]
