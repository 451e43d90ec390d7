"""Tables of the experiments' results: as Markdown with figures, and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae.results.figure import MISSING
from sae.results.markdown import document
from sae.results.table import NONE, Table
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
    rows = []
    for p, per_feature, norms, numbers in zip(
        result.densities, result.dimensions_per_feature, result.norms, result.dimensionality, strict=True
    ):
        learned = sorted(d for norm, d in zip(norms, numbers, strict=True) if norm > REPRESENTED)
        middle = f"{learned[len(learned) // 2]:.3f}" if learned else NONE
        rows.append((f"{1 / p:.3g}", f"{per_feature:.3f}", f"{len(learned)}", middle, f"{sum(numbers):.2f}"))
    note = (
        f"m / ‖W‖²: hidden dimensions per learned feature. Learned: features of norm above {REPRESENTED:g}, and "
        f"their median dimensionality. The sum is over all features, and never exceeds m = {result.hidden}."
    )
    return [Table.of_rows(("1 / density", "m / ‖W‖²", "learned", "median", "sum"), rows, notes=[note])]


def _phases(result: PhaseResult) -> list[Table]:
    ratios = sorted(ratio for row in result.loss_ratio for ratio in row)
    rows = [
        ("cells", f"{result.agree}", f"{result.cells}", f"{result.agree / result.cells:.1%}"),
        (
            f"cells of margin ≥ {AWAY:g}",
            f"{result.agree_away}",
            f"{result.cells_away}",
            f"{result.agree_away / result.cells_away:.1%}" if result.cells_away else NONE,
        ),
    ]
    note = (
        "A cell agrees if the last feature's phase is the same in the trained model and in the configuration of least "
        "loss. Margin: loss of the second-best phase divided by that of the best; dots mark cells with less, "
        f"crosses cells that differ. Trained loss divided by the least analytic one: {ratios[0]:.3f} to "
        f"{ratios[-1]:.3f}, median {ratios[len(ratios) // 2]:.3f}."
    )
    return [Table.of_rows(("", "agree", "of", "share"), rows, notes=[note])]


def _recovery(result: RecoveryResult) -> list[Table]:
    head = ("", *(column for dictionary in result.dictionaries for column in (dictionary.architecture, "null")))
    note = (
        f"{result.features} features in {result.d_in} dimensions, {result.mean_l0:g} present on average "
        f"({result.measured_l0:.3f} in the scored sample). Null: as many random directions as there are live features; "
        "for F1, another feature's latent. Precision and recall are by one-to-one matching."
    )
    parts = [Table.of_rows(head, _direction_rows(result.dictionaries), notes=[note])]
    if len({group.frequency for group in result.dictionaries[0].by_frequency}) > 1:
        note = (
            f"Recall at cosine {COSINE:g} and detection F1 are by tenths of the true features, most frequent first; "
            f"precision at cosine {COSINE:g} is by tenths of the live learned features, most often firing first. Null: "
            "F1 of another feature's latent."
        )
        *others, last = result.dictionaries
        parts += [*(_by_tenth(dictionary, "") for dictionary in others), _by_tenth(last, note)]
    return parts


def _direction_rows(dictionaries: Sequence[DictionaryScores]) -> Iterable[tuple[str, ...]]:
    def row(name: str, *pairs: tuple[float, float]) -> tuple[str, ...]:
        return (name, *(f"{number:.3f}" for pair in pairs for number in pair))

    for name, attribute in (
        ("mean max cosine, true", "mean_max_cosine_true"),
        ("mean max cosine, learned", "mean_max_cosine_learned"),
        ("matched cosine", "matched_cosine"),
    ):
        yield row(name, *((getattr(d.scores, attribute), getattr(d.null, attribute)) for d in dictionaries))
    for t in dictionaries[0].scores.recall:
        yield row(f"recall at {t:g}", *((d.scores.recall[t], d.null.recall[t]) for d in dictionaries))
    for t in dictionaries[0].scores.precision:
        yield row(f"precision at {t:g}", *((d.scores.precision[t], d.null.precision[t]) for d in dictionaries))
    yield row("detection F1", *((d.f1, d.null_f1) for d in dictionaries))
    yield ("live features", *(cell for d in dictionaries for cell in (f"{d.live}", "")))
    yield ("fire per row", *(cell for d in dictionaries for cell in (f"{d.l0:.2f}", "")))


def _by_tenth(dictionary: DictionaryScores, note: str) -> Table:
    head = (f"{dictionary.architecture}, tenth", "frequency", "recall", "precision", "F1", "null")
    rows = []
    for number, group in enumerate(dictionary.by_frequency):
        fired = dictionary.by_density[number : number + 1]
        precision = f"{fired[0].precision:.3f}" if fired else NONE
        scores = (f"{group.recall:.3f}", precision, f"{group.f1:.3f}", f"{group.null_f1:.3f}")
        rows.append((f"{number + 1}", f"{group.frequency:.4f}", *scores))
    return Table.of_rows(head, rows, notes=[note])


_TABLES = {
    GeometryResult: _geometry,
    DimensionalityResult: _dimensionality,
    PhaseResult: _phases,
    RecoveryResult: _recovery,
}
