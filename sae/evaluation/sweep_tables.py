"""The comparison of a sweep's dictionaries for people: as Markdown, and tables for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sae.evaluation.comparison_tables import MARK
from sae.evaluation.estimate import Estimate
from sae.evaluation.metrics import Totals, below_noise, difference
from sae.evaluation.pareto import Point, lines, values_of
from sae.evaluation.render import NONE, WIDE, pipe_table
from sae.evaluation.report import HEADINGS

if TYPE_CHECKING:
    from rich.table import Table

_METRICS = {"l0": "L0", "fvu": "FVU", "delta_ce": "ΔCE"}
_COMPARED = ("fvu", "delta_ce")
_UNKNOWN = Estimate(None, None)


@dataclass(frozen=True)
class Behind:
    """How far a dictionary is behind the best of its k.

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
    """Cells under a heading; `short` is what a narrow terminal shows in their place, `best` the rows in bold."""

    heading: str
    cells: list[str]
    short: list[str] | None
    best: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Table:
    """Columns under a title; `of_rest` is a note on those that a narrow terminal leaves out."""

    title: str
    columns: list[_Column]
    notes: tuple[str, ...]
    of_rest: str = ""


def behind_best(points: Mapping[str, Point], totals: Mapping[str, Totals]) -> Differences:
    """How far FVU and ΔCE of each dictionary are above the lowest of the same k, with paired standard errors.

    Dictionaries are beside each other where hook point and k, and the penalty's weight where that is fixed, are the
    same; width, seed and other settings may differ.

    Args:
        points: what is compared.
        totals: sums over documents of each.

    Returns:
        By name and metric; nothing for the best, and for what was not measured or on other tokens than the best.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, point in points.items():
        groups.setdefault((point.hook, point.k, point.weight), []).append(name)
    found: dict[str, dict[str, Behind]] = {}
    for names in groups.values():
        for metric in _COMPARED:
            measured = {name: value for name in names for value in values_of([points[name]], metric)}
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
        rows = zip(
            *(
                [f"**{cell}**" if row in column.best else cell for row, cell in enumerate(column.cells)]
                for column in table.columns
            ),
            strict=True,
        )
        parts.append(pipe_table([column.heading for column in table.columns], rows, text_columns=1) + "\n")
        parts += [f"{note}\n" for note in (*table.notes, table.of_rest) if note]
    if failures:
        parts.append(
            "## Not trained\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in failures.items()) + "\n"
        )
    return "\n".join(parts)


def sweep_tables(
    points: Mapping[str, Point], differences: Differences = _NOTHING, width: int | None = None
) -> list[Table]:
    """The same for a terminal.

    Args:
        points: what is compared.
        differences: as of `sweep_markdown`.
        width: characters of the terminal; below 120 only FVU and ΔCE of dictionaries have their standard errors, and
            time and memory are left out. None: it is wide enough.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    narrow = width is not None and width < WIDE
    made = []
    for table in _tables(points, differences):
        shown = [column for column in table.columns if column.short or not narrow]
        notes = [*table.notes, *([table.of_rest] if table.of_rest and not narrow else [])]
        drawn = Table(
            title=table.title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False,
            caption="\n".join(note.replace("**bold**", "bold") for note in notes), caption_justify="left",
        )  # fmt: skip
        for number, column in enumerate(shown):
            if number:
                drawn.add_column(column.heading, justify="right", no_wrap=True)
            else:
                drawn.add_column(column.heading, overflow="fold")
        cells = [(column.short if narrow and column.short else column.cells, column.best) for column in shown]
        for row in range(len(table.columns[0].cells)):
            drawn.add_row(*(Text(column[row], "bold" if row in best else "") for column, best in cells))
        made.append(drawn)
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
        behind = [differences.get(name, {}).get(metric) for name in points]
        best = {made.best for made in behind if made is not None}
        cells = [
            f"{estimate} {MARK}" if made is not None and below_noise(made.difference) else str(estimate)
            for estimate, made in zip(estimates, behind, strict=True)
        ]
        short = [estimate.short() for estimate in estimates] if metric == "l0" else cells
        rows = frozenset(row for row, name in enumerate(points) if name in best)
        columns.append(_Column(heading, cells, short, rows))
    dead = [f"{point.dead:.1%}" for point in points.values()]
    columns += [
        _Column("never fire", dead, dead),
        _Column("ms per 1,000 tokens", [_time(point) for point in points.values()], None),
        _Column("MB", [_memory(point) for point in points.values()], None),
    ]
    notes = ["± is the standard error over documents."]
    if any(differences.values()):
        notes.append(
            f"**bold**: the lowest of its k. {MARK}: no different from it: the 95 % interval of the difference, paired "
            "over documents, holds 0."
        )
    of_rest = "Time is that of a dictionary's own training steps, memory that of its weights and optimiser."
    return _Table("", columns, tuple(notes), of_rest)


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
