"""Results of many data sets in; means with standard errors over data sets, and who wins how often, out."""

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
        data_sets: how many these are.
        means: by metric, the mean over data sets and its standard error over them.
        shuffled: the same with shuffled labels; empty for the majority null.
        wins: data sets on which no other method has a higher AUC; a tie is a win of each.
    """

    data_sets: int
    means: dict[str, tuple[float, float | None]]
    shuffled: dict[str, tuple[float, float | None]]
    wins: int


@dataclass(frozen=True)
class Duel:
    """Two methods, data set by data set, by AUC.

    Attributes:
        wins, losses: data sets on which the first is higher, or lower.
        clear_wins, clear_losses: those of them where the difference exceeds two standard errors. These are of the two
            as if independent; probes on the same test examples err together, so that it is a cautious count.
        difference: mean over data sets, and its standard error over them.
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
    """Every method's means over data sets."""
    summaries = {}
    best = {name: max(one.scores.auc.value for one in result.methods.values()) for name, result in results.items()}
    for method in method_order(results):
        found = {name: result.methods[method] for name, result in results.items() if method in result.methods}
        wins = sum(one.scores.auc.value >= best[name] - _TIE for name, one in found.items())
        nulls = [one.shuffled for one in found.values() if one.shuffled is not None]
        summaries[method] = MethodSummary(
            len(found),
            {
                metric: mean_and_error([getattr(one.scores, metric).value for one in found.values()])
                for metric in METRICS
            },
            {metric: mean_and_error([getattr(null, metric).value for null in nulls]) for metric in METRICS if nulls},
            wins,
        )
    return summaries


def duel(results: Mapping[str, ProbeResult], first: str, second: str) -> Duel | None:
    """One method against another where both are; None where they nowhere are."""
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
    """Latents against as many neurons, and both against the dense probe."""
    names = method_order(results)
    pairs = [(name, name.replace("latents", "neurons")) for name in names if name.startswith("latents-")]
    pairs += [(name, "neurons-all") for name in names if name.startswith("latents-") and name != "latents-all"]
    made = [duel(results, first, second) for first, second in pairs]
    return [one for one in made if one is not None]


def heading(method: str) -> str:
    """What a method is called in tables: `1 latent`, `16 neurons`, `all latents`, `dense probe`."""
    if method == MAJORITY:
        return "majority"
    kind, _, k = method.partition("-")
    if k == "all":
        return {"latents": "all latents", "neurons": "dense probe"}[kind]
    return f"{k} {kind.removesuffix('s') if k == '1' else kind}"


def shown(methods: Sequence[str]) -> list[str]:
    """The few methods that a row for each data set has room for."""
    wanted = ["latents-1", "neurons-1", "latents-16", "neurons-16", "latents-all", "neurons-all"]
    return [name for name in wanted if name in methods] or [name for name in methods if name != MAJORITY][:6]


def _sign(difference: float) -> int:
    return 0 if abs(difference) <= _TIE else (1 if difference > 0 else -1)


def _clear(a: SplitEstimate, b: SplitEstimate) -> bool:
    if a.standard_error is None or b.standard_error is None:
        return False
    return abs(a.value - b.value) > 2 * math.hypot(a.standard_error, b.standard_error)
