"""Tables of the experiments' results: as Markdown with figures, and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import TYPE_CHECKING, Any

from sae.evaluation.recovery import DirectionScores
from sae.results.figure import MISSING
from sae.results.markdown import document
from sae.results.table import NONE, Column, Table
from sae.superposition.dictionaries import COSINE, DictionaryScores, RecoveryResult
from sae.superposition.experiments import DimensionalityResult, GeometryResult, PhaseResult
from sae.superposition.geometry import REPRESENTED
from sae.superposition.phases import AWAY

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Finished:
    """A finished experiment.

    Attributes:
        name: its key in `EXPERIMENTS`.
        title: its heading.
        settings: those it was run with.
        seed: likewise.
        seconds: how long it took.
        result: its result.
        figure: file name of its figure; None if matplotlib was missing.
    """

    name: str
    title: str
    settings: Any
    seed: int
    seconds: float
    result: Any
    figure: str | None


def markdown(done: Sequence[Finished]) -> str:
    """`superposition.md`: a section for each experiment."""
    parts = ["# Toy models of superposition"]
    for experiment in done:
        parts.append(f"## {experiment.title}")
        if experiment.figure:
            parts.append(f"![{experiment.title}]({experiment.figure})")
        for table in tables(experiment.result):
            parts += [table.in_markdown(), *table.markdown_notes()]
        parts.append(f"`{experiment.name}`, seed {experiment.seed}: {experiment.seconds:,.0f} seconds.")
    if any(experiment.figure is None for experiment in done):
        parts.append(MISSING)
    return document(parts)


def show(done: Finished, console: Console) -> None:
    """Print an experiment's tables."""
    console.print(f"{done.title} ({done.seconds:,.0f} s)", style="bold")
    for table in tables(done.result):
        console.print(table.in_terminal(console.width))
        if any(table.notes):
            console.print()


def tables(result: Any) -> list[Table]:
    """The tables of a result."""
    return _TABLES[type(result)](result)


def _geometry(result: GeometryResult) -> list[Table]:
    rows = [
        (
            f"{model.density:g}",
            f"{min(model.losses):.4g}",
            " ".join(f"{d:.2f}" for d in model.dimensionality),
            f"{sum(model.dimensionality):.3f}",
            " ".join(f"{angle:.0f}" for angle in model.angles) or NONE,
            f"{model.pentagons} of {len(model.losses)}",
        )
        for model in result.models
    ]
    note = (
        "The run with the lowest loss: the dimensionality of each feature, their sum, the angles in degrees between "
        "neighbours. Pentagons: runs, each from one seed, whose angles are 72° ± 2° and dimensionalities 2/5 ± 0.02."
    )
    return [Table.of_rows(("density", "loss", "dimensionality", "sum", "angles", "pentagons"), rows, notes=[note])]


def _dimensionality(result: DimensionalityResult) -> list[Table]:
    learned = [
        [d for norm, d in zip(norms, numbers, strict=True) if norm > REPRESENTED]
        for norms, numbers in zip(result.norms, result.dimensionality, strict=True)
    ]
    columns = [
        Column("1 / density", [f"{1 / p:.3g}" for p in result.densities], is_text=True),
        Column("m / ‖W‖²", [f"{per_feature:.3f}" for per_feature in result.dimensions_per_feature]),
        Column("learned", [f"{len(numbers)}" for numbers in learned]),
        Column("median", [f"{median_high(numbers):.3f}" if numbers else NONE for numbers in learned]),
        Column("sum", [f"{sum(numbers):.2f}" for numbers in result.dimensionality]),
    ]
    note = (
        f"m / ‖W‖²: hidden dimensions per learned feature. Learned: features of norm above {REPRESENTED:g}, and "
        f"their median dimensionality. The sum is over all features, and never exceeds m = {result.hidden}."
    )
    return [Table(columns, notes=[note])]


def _phases(result: PhaseResult) -> list[Table]:
    ratios = [ratio for row in result.loss_ratio for ratio in row]
    rows = [
        (name, f"{agree}", f"{cells}", f"{agree / cells:.1%}" if cells else NONE)
        for name, agree, cells in (
            ("cells", result.agree, result.cells),
            (f"cells of margin ≥ {AWAY:g}", result.agree_away, result.cells_away),
        )
    ]
    note = (
        "A cell agrees if the last feature's phase is the same in the trained model and in the configuration of least "
        "loss. Margin: loss of the second-best phase divided by that of the best; dots mark cells with less, "
        f"crosses cells that differ. Trained loss divided by the least analytic one: {min(ratios):.3f} to "
        f"{max(ratios):.3f}, median {median_high(ratios):.3f}."
    )
    return [Table.of_rows(("", "agree", "of", "share"), rows, notes=[note])]


def _recovery(result: RecoveryResult) -> list[Table]:
    first = result.dictionaries[0]
    columns = [Column("", [*_numbers(first.scores, first.f1), "live features", "fire per row"], is_text=True)]
    for d in result.dictionaries:
        counts = (f"{d.live}", f"{d.l0:.2f}")
        columns.append(Column(d.architecture, [*_numbers(d.scores, d.f1).values(), *counts]))
        columns.append(Column("null", [*_numbers(d.null, d.null_f1).values(), "", ""]))
    note = (
        f"{result.features} features in {result.d_in} dimensions, {result.mean_l0:g} present on average "
        f"({result.measured_l0:.3f} in the scored sample). Null: as many random directions as there are live features; "
        "for F1, another feature's latent. Precision and recall are by one-to-one matching."
    )
    parts = [Table(columns, notes=[note])]
    if len({group.frequency for group in first.by_frequency}) > 1:
        note = (
            f"Recall at cosine {COSINE:g} and detection F1 are by tenths of the true features, most frequent first; "
            f"precision at cosine {COSINE:g} is by tenths of the live learned features, most often firing first. Null: "
            "F1 of another feature's latent."
        )
        *others, last = result.dictionaries
        parts += [*(_by_tenth(dictionary, "") for dictionary in others), _by_tenth(last, note)]
    return parts


def _numbers(scores: DirectionScores, f1: float) -> dict[str, str]:
    """Numbers of a dictionary or of its null, by the name of their row."""
    numbers = {
        "mean max cosine, true": scores.mean_max_cosine_true,
        "mean max cosine, learned": scores.mean_max_cosine_learned,
        "matched cosine": scores.matched_cosine,
        **{f"recall at {threshold:g}": recall for threshold, recall in scores.recall.items()},
        **{f"precision at {threshold:g}": precision for threshold, precision in scores.precision.items()},
        "detection F1": f1,
    }
    return {name: f"{number:.3f}" for name, number in numbers.items()}


def _by_tenth(dictionary: DictionaryScores, note: str) -> Table:
    groups = dictionary.by_frequency
    precision = [f"{fired.precision:.3f}" for fired in dictionary.by_density[: len(groups)]]
    columns = [
        Column(f"{dictionary.architecture}, tenth", [f"{number + 1}" for number in range(len(groups))], is_text=True),
        Column("frequency", [f"{group.frequency:.4f}" for group in groups]),
        Column("recall", [f"{group.recall:.3f}" for group in groups]),
        Column("precision", precision + [NONE] * (len(groups) - len(precision))),
        Column("F1", [f"{group.f1:.3f}" for group in groups]),
        Column("null", [f"{group.null_f1:.3f}" for group in groups]),
    ]
    return Table(columns, notes=[note])


_TABLES = {
    GeometryResult: _geometry,
    DimensionalityResult: _dimensionality,
    PhaseResult: _phases,
    RecoveryResult: _recovery,
}
