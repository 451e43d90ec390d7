"""The metrics, each declared once, as a ratio of sums over documents with its place in tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae.results.estimate import TOKENS, Estimate, estimate_names, jackknife, left_out, ratio

POSITIONS = "positions"
"""Counts the tokens whose language-model losses were measured; `tokens` counts those of all other metrics."""

Totals = Mapping[str, Tensor]
"""Float64 sums `[documents]` by name, for all documents of the split; 0 for those without a token."""


@dataclass(frozen=True)
class Metric:
    """Σ numerator / Σ denominator over documents, and its place in tables and figures.

    Attributes:
        group: the part of a table that it stands in.
        meaning: what it is, in the tables of a report and a comparison.
        numerator: a sum's name, or `a-b` for the difference of two.
        denominator: likewise.
        complement: the metric is 1 minus the ratio.
        better: which values are better; None: neither lower nor higher ones.
        is_common: it is of the language model alone, the same for all dictionaries.
        heading: of its column in the tables of a sweep; empty: it has none.
        axis: label of its axis in the Pareto figure; empty: it is not drawn.
    """

    group: Literal["reconstruction", "sparsity", "losses"]
    meaning: str
    numerator: str
    denominator: str
    complement: bool = False
    better: Literal["lower", "higher"] | None = None
    is_common: bool = False
    heading: str = ""
    axis: str = ""

    @property
    def count(self) -> str:
        """The sum that tells which documents have a token."""
        return POSITIONS if self.group == "losses" else TOKENS


METRICS = {
    "fvu": Metric(
        "reconstruction", "fraction of variance unexplained", "error", "deviation", better="lower",
        heading="FVU", axis="fraction of variance unexplained",
    ),
    "explained_variance": Metric(
        "reconstruction", "1 − fvu", "error", "deviation", complement=True, better="higher"
    ),
    "mse": Metric("reconstruction", "mean ‖x − x̂‖²", "error", TOKENS, better="lower"),
    "cosine": Metric("reconstruction", "mean cos(x, x̂)", "cosine", "nonzero", better="higher"),
    "l2_ratio": Metric("reconstruction", "mean ‖x̂‖ / ‖x‖", "l2_ratio", "nonzero"),
    "relative_reconstruction_bias": Metric("reconstruction", "E‖x̂‖² / E[x·x̂]", "power", "product"),
    "l0": Metric("sparsity", "features per token", "l0", TOKENS, heading="L0"),
    "l1": Metric("sparsity", "mean Σ|f|", "l1", TOKENS),
    "ce_clean": Metric("losses", "loss with nothing replaced", "clean", POSITIONS, is_common=True),
    "ce_zero": Metric("losses", "with 0 in place of x", "zero", POSITIONS, is_common=True),
    "ce_mean": Metric("losses", "with x̄", "mean", POSITIONS, is_common=True),
    "ce_spliced": Metric("losses", "loss with x̂ in place of x", "spliced", POSITIONS, better="lower"),
    "delta_ce": Metric(
        "losses", "spliced − clean", "spliced-clean", POSITIONS, better="lower",
        heading="ΔCE", axis="ΔCE, nats per token",
    ),
    "ce_recovered_zero": Metric(
        "losses", "share of the loss of 0 recovered", "zero-spliced", "zero-clean", better="higher"
    ),
    "ce_recovered_mean": Metric(
        "losses", "share of the loss of x̄ recovered", "mean-spliced", "mean-clean", better="higher"
    ),
    "kl": Metric("losses", "KL(clean ‖ spliced)", "kl", POSITIONS, better="lower"),
}  # fmt: skip
"""Every metric, in the order of the tables. Adding one takes an entry here and its sums in the module of its group."""


def swept() -> dict[str, Metric]:
    """The metrics in the tables of a sweep: first those that are given, such as L0, then those to compare."""
    shown = {name: metric for name, metric in METRICS.items() if metric.heading}
    return dict(sorted(shown.items(), key=lambda item: item[1].better is not None))


def estimate(metric: str, totals: Totals) -> Estimate:
    """A metric and its standard error over documents."""
    numerator, denominator = _terms(METRICS[metric], totals)
    quotient = ratio(numerator, denominator)
    if METRICS[metric].complement and quotient.value is not None:
        return Estimate(1 - quotient.value, quotient.standard_error, quotient.degrees_of_freedom)
    return quotient


def estimates(scores: type, totals: Totals) -> dict[str, Estimate]:
    """The metrics that a class of scores has fields for."""
    return {metric: estimate(metric, totals) for metric in estimate_names(scores)}


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


def _has(kind: Metric, totals: Totals) -> bool:
    names = (*kind.numerator.split("-"), *kind.denominator.split("-"), kind.count)
    return all(name in totals for name in names)


def _terms(kind: Metric, totals: Totals) -> tuple[Float[Tensor, " documents"], Float[Tensor, " documents"]]:
    """Numerator and denominator of the documents that have a token."""
    present = totals[kind.count] > 0
    return _term(kind.numerator, totals)[present], _term(kind.denominator, totals)[present]


def _term(name: str, totals: Totals) -> Float[Tensor, " documents"]:
    first, _, second = name.partition("-")
    return totals[first] - totals[second] if second else totals[first]
