"""Summarise results over data sets: means with standard errors, and how often each method wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sae.probing.scores import METRICS, SplitEstimate, mean_and_error
from sae.probing.sparse_probes import MAJORITY, ProbeResult

_TIE = 1e-12


@dataclass(frozen=True)
class MethodSummary:
    """One kind of probe over all data sets that have it.

    Attributes:
        data_sets: number of these data sets.
        means: by metric, the mean over data sets and its standard error over them.
        shuffled: the same with shuffled labels; empty for the majority null.
        wins: number of data sets on which no other method has a higher AUC; a tie is a win for each.
    """

    data_sets: int
    means: dict[str, tuple[float, float | None]]
    shuffled: dict[str, tuple[float, float | None]]
    wins: int


@dataclass(frozen=True)
class Duel:
    """Comparison of two methods by AUC, data set by data set.

    Attributes:
        wins, losses: number of data sets on which the first is higher, or lower.
        clear_wins, clear_losses: number of these where the difference exceeds two standard errors, as if the two were
            independent. Errors of probes on the same test examples are correlated, so the count is conservative.
        difference: mean difference over data sets, and its standard error over them.
    """

    first: str
    second: str
    wins: int
    losses: int
    clear_wins: int
    clear_losses: int
    difference: tuple[float, float | None]


def method_order(results: Mapping[str, ProbeResult]) -> list[str]:
    """Names of all methods, in the order of the tables."""
    return list(dict.fromkeys(name for result in results.values() for name in result.methods))


def summarise(results: Mapping[str, ProbeResult]) -> dict[str, MethodSummary]:
    """Summary of each method over data sets."""
    summaries = {}
    best = {
        name: max(method.scores.auc.value for method in result.methods.values()) for name, result in results.items()
    }
    for method in method_order(results):
        scored = {name: result.methods[method] for name, result in results.items() if method in result.methods}
        wins = sum(entry.scores.auc.value >= best[name] - _TIE for name, entry in scored.items())
        nulls = [entry.shuffled for entry in scored.values() if entry.shuffled is not None]
        summaries[method] = MethodSummary(
            len(scored),
            {
                metric: mean_and_error([getattr(entry.scores, metric).value for entry in scored.values()])
                for metric in METRICS
            },
            {metric: mean_and_error([getattr(null, metric).value for null in nulls]) for metric in METRICS if nulls},
            wins,
        )
    return summaries


def duel(results: Mapping[str, ProbeResult], first: str, second: str) -> Duel | None:
    """One method against another on the data sets that have both; None if there are none."""
    pairs = [
        (result.methods[first].scores.auc, result.methods[second].scores.auc)
        for result in results.values()
        if first in result.methods and second in result.methods
    ]
    if not pairs:
        return None
    signs = [(_sign(a.value - b.value), _clear(a, b)) for a, b in pairs]
    return Duel(
        first, second,
        wins=sum(sign > 0 for sign, _ in signs),
        losses=sum(sign < 0 for sign, _ in signs),
        clear_wins=sum(sign > 0 and clear for sign, clear in signs),
        clear_losses=sum(sign < 0 and clear for sign, clear in signs),
        difference=mean_and_error([a.value - b.value for a, b in pairs]),
    )  # fmt: skip


def duels(results: Mapping[str, ProbeResult]) -> list[Duel]:
    """Latents against the same number of neurons, and latents against the dense probe."""
    names = method_order(results)
    pairs = [(name, name.replace("latents", "neurons")) for name in names if name.startswith("latents-")]
    pairs += [(name, "neurons-all") for name in names if name.startswith("latents-") and name != "latents-all"]
    comparisons = [duel(results, first, second) for first, second in pairs]
    return [comparison for comparison in comparisons if comparison is not None]


def heading(method: str) -> str:
    """A method's name in tables: `1 latent`, `16 neurons`, `all latents`, `dense probe`."""
    if method == MAJORITY:
        return "majority"
    kind, _, k = method.partition("-")
    if k == "all":
        return {"latents": "all latents", "neurons": "dense probe"}[kind]
    return f"{k} {kind.removesuffix('s') if k == '1' else kind}"


def shown(methods: Sequence[str]) -> list[str]:
    """The few methods that fit into a table with a row per data set."""
    preferred = ["latents-1", "neurons-1", "latents-16", "neurons-16", "latents-all", "neurons-all"]
    return [name for name in preferred if name in methods] or [name for name in methods if name != MAJORITY][:6]


def _sign(difference: float) -> int:
    return 0 if abs(difference) <= _TIE else (1 if difference > 0 else -1)


def _clear(a: SplitEstimate, b: SplitEstimate) -> bool:
    if a.standard_error is None or b.standard_error is None:
        return False
    return abs(a.value - b.value) > 2 * math.hypot(a.standard_error, b.standard_error)
