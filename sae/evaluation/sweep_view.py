"""Tables that compare a sweep's dictionaries, as Markdown and for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sae.architectures import ARCHITECTURES
from sae.evaluation.metrics import METRICS, Metric, Totals, below_noise, difference, swept
from sae.evaluation.pareto import Point, lines, values_of
from sae.evaluation.report import HEADINGS
from sae.results.estimate import Estimate, error_note
from sae.results.markdown import document, plain
from sae.results.table import BEST, NONE, SAME, Column, Table

if TYPE_CHECKING:
    from rich.console import Group

_UNKNOWN = Estimate(None, None)


@dataclass(frozen=True)
class GapToBest:
    """How far a dictionary is behind the best of its group, from `behind_best`.

    Attributes:
        best: name of the dictionary with the best value.
        difference: to that, with its paired standard error over documents; at least 0 if lower values are better.
    """

    best: str
    difference: Estimate

    def to_json(self) -> dict[str, Any]:
        return {"best": self.best, **self.difference.to_json(), "below_noise": below_noise(self.difference)}


Differences = Mapping[str, Mapping[str, GapToBest]]
_NOTHING: Differences = MappingProxyType({})


def behind_best(points: Mapping[str, Point], totals: Mapping[str, Totals]) -> Differences:
    """How far each dictionary is behind the best of the same k, by metric, with paired standard errors.

    Dictionaries are compared if they have the same hook point, the same k, and the same penalty and weight if that is
    fixed; width, seed and other settings may differ.

    Args:
        points: the dictionaries to compare.
        totals: sums over documents of each.

    Returns:
        Gaps by name and metric; none for the best, nor for values that were not measured, are not finite, or come from
        other tokens than the best.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, point in points.items():
        fixed = None if point.weight is None else (point.weight, ARCHITECTURES[point.architecture].penalty)
        groups.setdefault((point.hook, point.k, fixed), []).append(name)
    compared = {name: metric.better for name, metric in swept().items() if metric.better}
    gaps: dict[str, dict[str, GapToBest]] = {}
    for names in groups.values():
        for metric, better in compared.items():
            measured = {
                name: value for name in names for value in values_of([points[name]], metric) if math.isfinite(value)
            }
            best = (min if better == "lower" else max)(measured, key=lambda name: measured[name], default="")
            for name in measured:
                gap = None if name == best else difference(metric, totals[name], totals[best])
                if gap is not None:
                    gaps.setdefault(name, {})[metric] = GapToBest(best, gap)
    return gaps


def sweep_markdown(
    points: Mapping[str, Point],
    failures: Mapping[str, str],
    figure: str | None,
    differences: Differences = _NOTHING,
    of: str | None = None,
) -> str:
    """`sweep.md`: a row for each dictionary, means over seeds, and baselines.

    Args:
        points: the dictionaries to compare.
        failures: why others are missing.
        figure: file of the plot; None: no plot.
        differences: from `behind_best`; the best are bold, and those that differ from them only within noise are
            marked.
        of: what all were trained and evaluated on.
    """
    parts = ["# Sweep\n", *([f"{of}\n"] if of else [])]
    if figure:
        parts.append(f"![error against L0]({figure})\n")
    for table in _tables(points, differences):
        parts += [f"## {table.title}\n"] if table.title else []
        parts += [f"{part}\n" for part in (table.in_markdown(), *table.markdown_notes())]
    if failures:
        reasons = (f"- {plain(name)}: {plain(reason)}" for name, reason in failures.items())
        parts.append("## Not trained\n\n" + "\n".join(reasons) + "\n")
    return document(parts, "\n")


def sweep_tables(
    points: Mapping[str, Point], differences: Differences = _NOTHING, width: int | None = None
) -> list[Group]:
    """The tables of `sweep_markdown` for a terminal.

    Args:
        points: the dictionaries to compare.
        differences: as for `sweep_markdown`.
        width: of the terminal, in characters; below 120, time and memory are left out, and, if they do not fit,
            standard errors of what is not compared, such as L0. None: wide enough.
    """
    return [table.in_terminal(width) for table in _tables(points, differences)]


def _tables(points: Mapping[str, Point], differences: Differences) -> list[Table]:
    if not points:
        return []
    metrics = {
        name: metric for name, metric in swept().items() if any(name in point.metrics for point in points.values())
    }
    tables = [
        _dictionaries(points, metrics, differences),
        _over_seeds(list(points.values()), metrics),
        _baselines(points),
    ]
    return [table for table in tables if table is not None]


def _dictionaries(points: Mapping[str, Point], metrics: Mapping[str, Metric], differences: Differences) -> Table:
    """A row for each dictionary."""
    columns = [_names(list(points), "dictionary")]
    for name, metric in metrics.items():
        estimates = [point.metrics.get(name, _UNKNOWN) for point in points.values()]
        behind = {dictionary: gaps[name] for dictionary, gaps in differences.items() if name in gaps}
        best = {gap.best for gap in behind.values()}
        same = {dictionary for dictionary, gap in behind.items() if below_noise(gap.difference)}
        cells = [str(estimate) for estimate in estimates]
        short = cells if metric.better else [estimate.short() for estimate in estimates]
        marks = [BEST if dictionary in best else SAME if dictionary in same else "" for dictionary in points]
        columns.append(Column(metric.heading, cells, short, marks=marks))
    dead = [f"{point.dead:.1%}" for point in points.values()]
    columns += [
        Column("never fire", dead, dead),
        Column("ms per 1,000 tokens", [_time(point) for point in points.values()], is_extra=True),
        Column("MB", [_memory(point) for point in points.values()], is_extra=True),
    ]
    with_errors = any(point.fvu.standard_error is not None for point in points.values())
    errors = (
        "± is the standard error over documents." if with_errors else f"{error_note({'documents': 1}).capitalize()}."
    )
    notes = (errors, *_on_marks(list(points.values()), differences))
    cost_note = "Time is that of a dictionary's own training steps, memory that of its weights and optimiser."
    return Table(columns, notes=notes, extra_notes=[cost_note])


def _on_marks(points: Sequence[Point], differences: Differences) -> list[str]:
    """Notes that explain the marks."""
    values = [gap.difference for gaps in differences.values() for gap in gaps.values()]
    if not values:
        return []
    shared = ["hook point"] if len({point.hook for point in points}) > 1 else []
    shared += ["k", *(["fixed weight of the penalty"] if any(point.weight is not None for point in points) else [])]
    lowest = {METRICS[name].better for gaps in differences.values() for name in gaps} == {"lower"}
    best = f"{{best}}: the {'lowest' if lowest else 'best'} of its {' and '.join(shared)}."
    if all(difference.interval is None for difference in values):
        return [f"{best} One document cannot show what is noise."]
    return [
        f"{best} {SAME}: no different from it: the 95 % interval of the difference, paired over documents, holds 0."
    ]


def _over_seeds(points: Sequence[Point], metrics: Mapping[str, Metric]) -> Table | None:
    """Means and spreads over seeds, for dictionaries that were trained with several; None if there are none."""
    several = [(label, seeds) for label, series in lines(points).items() for seeds in series if len(seeds) > 1]
    if not several:
        return None
    names = [
        f"{label}, k {seeds[0].k}" + ("" if seeds[0].weight is None else f", weight {seeds[0].weight:g}")
        for label, seeds in several
    ]
    counts = [str(len(seeds)) for _, seeds in several]
    columns = [_names(names, "dictionary"), Column("seeds", counts, counts)]
    for name, metric in metrics.items():
        cells = [str(_spread(values_of(seeds, name))) for _, seeds in several]
        columns.append(Column(metric.heading, cells, cells))
    return Table(columns, "Over seeds", ["± is the standard deviation over seeds."])


def _baselines(points: Mapping[str, Point]) -> Table | None:
    """FVU of each dictionary and its baselines."""
    kinds = dict.fromkeys(kind for point in points.values() for kind in point.baselines if kind != "identity")
    if not kinds:
        return None
    columns = [
        _names(list(points), "FVU"),
        _estimates("dictionary", [point.fvu for point in points.values()]),
        *(_estimates(HEADINGS[kind], [p.baselines.get(kind, _UNKNOWN) for p in points.values()]) for kind in kinds),
    ]
    return Table(columns, "Baselines", [_baselines_note(kinds, (" → " in point.hook for point in points.values()))])


def _baselines_note(kinds: Collection[str], transcodes: Iterable[bool]) -> str:
    """What the baselines of a table are.

    Args:
        kinds: of the baselines, without the identity.
        transcodes: of each dictionary, whether it gives another hook point than it reads.
    """
    are_transcoders = set(transcodes)
    parts = ["each has the dictionary's size"]
    if True in are_transcoders:
        parts = ["PCA has the dictionary's size; that of a transcoder is of its target"]
        parts += ["random dictionaries and frozen decoders are for the others"] if False in are_transcoders else []
    parts += ["linear is the best affine map from what a transcoder reads"] if "linear" in kinds else []
    parts += ["skip is W_skip of the dictionary alone, with the best constant"] if "skip" in kinds else []
    note = "; ".join([*parts, "the identity has FVU 0 and ΔCE 0"])
    return f"{note[0].upper()}{note[1:]}."


def _names(names: list[str], heading: str) -> Column:
    return Column(heading, names, is_text=True)


def _estimates(heading: str, estimates: Sequence[Estimate]) -> Column:
    return Column(heading, [str(estimate) for estimate in estimates], [estimate.short() for estimate in estimates])


def _spread(values: Sequence[float]) -> Estimate:
    return Estimate(statistics.mean(values), statistics.stdev(values)) if len(values) > 1 else _UNKNOWN


def _time(point: Point) -> str:
    """Milliseconds per thousand tokens."""
    return f"{1e6 * point.seconds / point.tokens:,.1f}" if point.seconds and point.tokens else NONE


def _memory(point: Point) -> str:
    """Megabytes."""
    return NONE if point.bytes is None else f"{point.bytes / 1e6:,.0f}"
