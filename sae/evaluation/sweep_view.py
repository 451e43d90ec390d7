"""The comparison of a sweep's dictionaries for people: as Markdown, and tables for the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sae.evaluation.comparison_view import MARK
from sae.evaluation.metrics import Totals, below_noise, difference
from sae.evaluation.pareto import Point, lines, values_of
from sae.evaluation.report import HEADINGS
from sae.evaluation.report_view import NONE
from sae.results.columns import Column, fitted
from sae.results.estimate import Estimate, error_note
from sae.results.markdown import document, pipe_table, plain

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_METRICS = {"l0": "L0", "fvu": "FVU", "delta_ce": "ΔCE"}
_COMPARED = ("fvu", "delta_ce")
_BEST = "*"
WIDE = 120
_UNKNOWN = Estimate(None, None)


@dataclass(frozen=True)
class Behind:
    """How far a dictionary is behind the best of its group, as `behind_best` makes them.

    Attributes:
        best: name of the dictionary whose value is the lowest.
        difference: to that, at least 0, with its paired standard error over documents.
    """

    best: str
    difference: Estimate

    def to_json(self) -> dict[str, Any]:
        return {"best": self.best, **self.difference.to_json(), "below_noise": below_noise(self.difference)}


Differences = Mapping[str, Mapping[str, Behind]]
_NOTHING: Differences = MappingProxyType({})


@dataclass(frozen=True)
class _Column:
    """Cells under a heading, and their marks, if any; `short` is what a narrow terminal shows in their place."""

    heading: str
    cells: list[str]
    short: list[str] | None
    marks: list[str] = field(default_factory=list)

    def in_terminal(self, *, is_text: bool) -> Column:
        """The cells; values stand below each other whether they are marked or not."""
        return Column(self.heading, self._marked(self.cells), self.short and self._marked(self.short), is_text)

    def _marked(self, cells: Sequence[str]) -> list[Text]:
        from rich.text import Text

        marks = self.marks or [""] * len(cells)
        return [
            Text(f"{cell} {mark:1}" if any(self.marks) else cell, "bold" if mark == _BEST else "")
            for cell, mark in zip(cells, marks, strict=True)
        ]

    def in_markdown(self) -> Iterator[str]:
        """The cells, the best in bold."""
        for cell, mark in zip(self.cells, self.marks or [""] * len(self.cells), strict=True):
            yield f"**{cell}**" if mark == _BEST else f"{cell} {mark}".strip()


@dataclass(frozen=True)
class _Table:
    """Columns under a title; `of_rest` is a note on those that a narrow terminal leaves out.

    In `notes`, `{best}` is how the best is marked.
    """

    title: str
    columns: list[_Column]
    notes: tuple[str, ...]
    of_rest: str = ""


def behind_best(points: Mapping[str, Point], totals: Mapping[str, Totals]) -> Differences:
    """How far FVU and ΔCE of each dictionary are above the lowest of the same k, with paired standard errors.

    Dictionaries are beside each other where hook point and k, and the penalty with its weight where that is fixed, are
    the same; width, seed and other settings may differ.

    Args:
        points: what is compared.
        totals: sums over documents of each.

    Returns:
        By name and metric; nothing for the best, and for what was not measured, is not finite, or is of other tokens
        than the best.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, point in points.items():
        fixed = None if point.weight is None else (point.weight, point.architecture == "jumprelu")  # L0, or L1
        groups.setdefault((point.hook, point.k, fixed), []).append(name)
    found: dict[str, dict[str, Behind]] = {}
    for names in groups.values():
        for metric in _COMPARED:
            measured = {
                name: value for name in names for value in values_of([points[name]], metric) if math.isfinite(value)
            }
            best = min(measured, key=lambda name: measured[name], default="")
            for name in measured:
                made = None if name == best else difference(metric, totals[name], totals[best])
                if made is not None:
                    found.setdefault(name, {})[metric] = Behind(best, made)
    return found


def sweep_markdown(
    points: Mapping[str, Point],
    failures: Mapping[str, str],
    figure: str | None,
    differences: Differences = _NOTHING,
    of: str | None = None,
) -> str:
    """`sweep.md`: a line for each dictionary, means over seeds, and baselines.

    Args:
        points: what is compared.
        failures: why others are missing.
        figure: file of the plot; None: there is none.
        differences: of `behind_best`; the best are bold, and those that differ from them less than their noise are
            marked.
        of: what all were trained and evaluated on.
    """
    parts = ["# Sweep\n", *([f"{of}\n"] if of else [])]
    if figure:
        parts.append(f"![error against L0]({figure})\n")
    for table in _tables(points, differences):
        parts += [f"## {table.title}\n"] if table.title else []
        rows = zip(*(column.in_markdown() for column in table.columns), strict=True)
        parts.append(pipe_table([column.heading for column in table.columns], rows, text_columns=1) + "\n")
        parts += [f"{note.format(best='**bold**')}\n" for note in (*table.notes, table.of_rest) if note]
    if failures:
        reasons = (f"- {plain(name)}: {plain(reason)}" for name, reason in failures.items())
        parts.append("## Not trained\n\n" + "\n".join(reasons) + "\n")
    return document(parts, "\n")


def sweep_tables(
    points: Mapping[str, Point], differences: Differences = _NOTHING, width: int | None = None
) -> list[Group]:
    """The same for a terminal.

    Args:
        points: what is compared.
        differences: as of `sweep_markdown`.
        width: characters of the terminal; below 120 time and memory are left out, and where they do not fit, standard
            errors other than those of FVU and ΔCE. None: it is wide enough.
    """
    narrow = width is not None and width < WIDE
    made = []
    for table in _tables(points, differences):
        shown = [column for column in table.columns if column.short or not narrow]
        notes = [*table.notes, *([table.of_rest] if table.of_rest and not narrow else [])]
        columns = [column.in_terminal(is_text=not number) for number, column in enumerate(shown)]
        note = "\n".join(note.format(best=_BEST) for note in notes)
        made.append(fitted(columns, width, title=table.title, note=note))
    return made


def _tables(points: Mapping[str, Point], differences: Differences) -> list[_Table]:
    if not points:
        return []
    metrics = {
        metric: heading
        for metric, heading in _METRICS.items()
        if metric != "delta_ce" or any(point.delta_ce is not None for point in points.values())
    }
    found = [_dictionaries(points, metrics, differences), _over_seeds(list(points.values()), metrics), _beside(points)]
    return [table for table in found if table is not None]


def _dictionaries(points: Mapping[str, Point], metrics: Mapping[str, str], differences: Differences) -> _Table:
    """A line for each."""
    columns = [_names(list(points), "dictionary")]
    for metric, heading in metrics.items():
        estimates = [_estimate(point, metric) for point in points.values()]
        behind = {name: found[metric] for name, found in differences.items() if metric in found}
        best = {made.best for made in behind.values()}
        same = {name for name, made in behind.items() if below_noise(made.difference)}
        cells = [str(estimate) for estimate in estimates]
        short = [estimate.short() for estimate in estimates] if metric == "l0" else cells
        marks = [_BEST if name in best else MARK if name in same else "" for name in points]
        columns.append(_Column(heading, cells, short, marks))
    dead = [f"{point.dead:.1%}" for point in points.values()]
    columns += [
        _Column("never fire", dead, dead),
        _Column("ms per 1,000 tokens", [_time(point) for point in points.values()], None),
        _Column("MB", [_memory(point) for point in points.values()], None),
    ]
    with_errors = any(point.fvu.standard_error is not None for point in points.values())
    errors = (
        "± is the standard error over documents." if with_errors else f"{error_note({'documents': 1}).capitalize()}."
    )
    notes = (errors, *_on_marks(list(points.values()), differences))
    of_rest = "Time is that of a dictionary's own training steps, memory that of its weights and optimiser."
    return _Table("", columns, notes, of_rest)


def _on_marks(points: Sequence[Point], differences: Differences) -> list[str]:
    """What the marks mean."""
    made = [behind.difference for found in differences.values() for behind in found.values()]
    if not made:
        return []
    of = ["hook point"] if len({point.hook for point in points}) > 1 else []
    of += ["k", *(["fixed weight of the penalty"] if any(point.weight is not None for point in points) else [])]
    best = f"{{best}}: the lowest of its {' and '.join(of)}."
    if all(difference.interval is None for difference in made):
        return [f"{best} One document does not tell what is noise."]
    return [
        f"{best} {MARK}: no different from it: the 95 % interval of the difference, paired over documents, holds 0."
    ]


def _over_seeds(points: Sequence[Point], metrics: Mapping[str, str]) -> _Table | None:
    """Means over seeds of metrics with their headings, where a dictionary was trained with several, and the spread."""
    several = [(label, seeds) for label, series in lines(points).items() for seeds in series if len(seeds) > 1]
    if not several:
        return None
    names = [
        f"{label}, k {seeds[0].k}" + ("" if seeds[0].weight is None else f", weight {seeds[0].weight:g}")
        for label, seeds in several
    ]
    counts = [str(len(seeds)) for _, seeds in several]
    columns = [_names(names, "dictionary"), _Column("seeds", counts, counts)]
    for metric, heading in metrics.items():
        cells = [str(_spread(values_of(seeds, metric))) for _, seeds in several]
        columns.append(_Column(heading, cells, cells))
    return _Table("Over seeds", columns, ("± is the standard deviation over seeds.",))


def _beside(points: Mapping[str, Point]) -> _Table | None:
    """FVU of what each dictionary stands beside."""
    kinds = dict.fromkeys(kind for point in points.values() for kind in point.baselines if kind != "identity")
    if not kinds:
        return None
    columns = [
        _names(list(points), "FVU"),
        _estimates("dictionary", [point.fvu for point in points.values()]),
        *(_estimates(HEADINGS[kind], [p.baselines.get(kind, _UNKNOWN) for p in points.values()]) for kind in kinds),
    ]
    return _Table("Baselines", columns, ("Of the same size each; the identity has FVU 0 and ΔCE 0.",))


def _names(names: list[str], heading: str) -> _Column:
    return _Column(heading, names, names)


def _estimates(heading: str, estimates: Sequence[Estimate]) -> _Column:
    return _Column(heading, [str(estimate) for estimate in estimates], [estimate.short() for estimate in estimates])


def _estimate(point: Point, metric: str) -> Estimate:
    found: Estimate | None = getattr(point, metric)
    return _UNKNOWN if found is None else found


def _spread(values: Sequence[float]) -> Estimate:
    return Estimate(statistics.mean(values), statistics.stdev(values)) if len(values) > 1 else _UNKNOWN


def _time(point: Point) -> str:
    """Milliseconds for a thousand tokens."""
    return f"{1e6 * point.seconds / point.tokens:,.1f}" if point.seconds and point.tokens else NONE


def _memory(point: Point) -> str:
    """Megabytes."""
    return NONE if point.bytes is None else f"{point.bytes / 1e6:,.0f}"
