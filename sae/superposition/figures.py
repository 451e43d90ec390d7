"""Figures of the experiments' results, as PNG: features in the plane, dimensionality, phases, recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae.evaluation.pareto import ARCHITECTURE_COLOURS
from sae.results.figure import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    TEAL,
    Canvas,
    bare,
    cells,
    circle,
    drawing,
    line,
    logarithmic,
    patch,
    title,
)
from sae.superposition.dictionaries import COSINE, RecoveryResult
from sae.superposition.experiments import DimensionalityResult, GeometryResult, PhaseResult
from sae.superposition.phases import AWAY, PHASES

if TYPE_CHECKING:
    from sae.results.figure import Artist

_FEATURES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY, TEAL, BROWN)
_PHASE_COLOURS = (PALE, BLUE, ORANGE)
_RECALL: dict[str, Any] = {"marker": "o", "linestyle": "-", "markersize": 4}
_PRECISION: dict[str, Any] = {"marker": "s", "linestyle": ":", "markersize": 3.5}
_NULL: dict[str, Any] = {"linestyle": "--", "linewidth": 1}
_POLYTOPES = {"tetrahedron 3/4": 3 / 4, "triangle 2/3": 2 / 3, "pair 1/2": 1 / 2, "pentagon 2/5": 2 / 5}


@drawing
def draw(result: Any) -> bytes:
    """A result's figure; None if matplotlib is not installed."""
    return _FIGURES[type(result)](result)


def _geometry(result: GeometryResult) -> bytes:
    canvas = Canvas(1, len(result.models), (1.75 * len(result.models), 2.5))
    for axes, model in zip(canvas.axes, result.models, strict=True):
        bare(axes)
        circle(axes, 1.0)
        for number, (x, y) in enumerate(model.W):
            color = _FEATURES[number % len(_FEATURES)]
            axes.plot([0, x], [0, y], color=color, linewidth=1.6, solid_capstyle="round")
            axes.plot([x], [y], "o", color=color, markersize=4.5)
        axes.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal")
        axes.set_title(f"density {model.density:g}", fontsize=9, color=INK)
    handles = [
        line(f"importance {importance:.2f}", color=color, marker="o", markersize=4.5)
        for color, importance in zip(_FEATURES, result.importance, strict=False)
    ]
    canvas.legend("lower", handles, columns=len(handles))
    return canvas.png()


def _dimensionality(result: DimensionalityResult) -> bytes:
    canvas = Canvas(1, 1, (6.8, 3.8))
    axes = canvas.axes[0]
    x = [1 / p for p in result.densities]
    axes.plot(x, result.dimensionality, "o", color=BLUE, markersize=2.6, alpha=0.25, markeredgewidth=0)
    axes.plot([], [], "o", color=BLUE, markersize=3, label="dimensionality of a feature")
    axes.plot(x, result.dimensions_per_feature, color=ORANGE, linewidth=1.6, label="m / ‖W‖²")
    canvas.legend("upper", columns=2, size=9)
    logarithmic(axes, "x", (x[0], x[-1]))
    limits = (x[0] / 1.1, x[-1] * 1.1)
    axes.set(xlim=limits, ylim=(-0.02, 1.08), xlabel="1 / density", ylabel="dimensions")
    axes.grid(False)
    for label, height in _POLYTOPES.items():
        axes.axhline(height, color=GREY, linewidth=0.7, linestyle="--")
        axes.text(1.01, height, label, transform=axes.get_yaxis_transform(), fontsize=8, color=GREY, va="center")
    return canvas.png()


def _phases(result: PhaseResult) -> bytes:
    canvas = Canvas(1, 2, (8.2, 3.9))
    x, y = 1 / np.array(result.densities), np.array(result.importances)
    trained, analytic = np.array(result.trained), np.array(result.analytic)
    for axes, name, kinds in zip(canvas.axes, ("trained", "analytic"), (trained, analytic), strict=True):
        cells(axes, x, y, kinds.T, _PHASE_COLOURS)
        logarithmic(axes, "x", (x[0], x[-1]))
        logarithmic(axes, "y", (y[0], y[-1]))
        axes.set_xlabel("1 / density")
        title(axes, name)
    canvas.axes[0].set_ylabel("importance of the last feature")
    legend: list[Artist] = [patch(phase, colour) for colour, phase in zip(_PHASE_COLOURS, PHASES, strict=True)]
    for axes, marked, marker, color, label in (
        (canvas.axes[1], np.array(result.margin) < AWAY, ".", INK, f"margin below {AWAY:g}"),
        (canvas.axes[0], trained != analytic, "x", RED, "not as analytic"),
    ):
        rows, columns = marked.nonzero()
        style = {"marker": marker, "color": color, "linestyle": "none", "markersize": 5}
        axes.plot(x[rows], y[columns], **style)
        legend.append(line(label, **style))
    canvas.legend("upper", legend, columns=5, size=9)
    return canvas.png()


def _recovery(result: RecoveryResult) -> bytes:
    by_frequency = len({group.frequency for group in result.dictionaries[0].by_frequency}) > 1
    canvas = Canvas(1, 3 if by_frequency else 1, (10.2 if by_frequency else 4.6, 3.3))
    for dictionary in result.dictionaries:
        color, thresholds = ARCHITECTURE_COLOURS.get(dictionary.architecture, INK), list(dictionary.scores.recall)
        canvas.axes[0].plot(thresholds, list(dictionary.scores.recall.values()), color=color, **_RECALL)
        canvas.axes[0].plot(thresholds, list(dictionary.scores.precision.values()), color=color, **_PRECISION)
        canvas.axes[0].plot(thresholds, list(dictionary.null.recall.values()), color=GREY, **_NULL)
        if by_frequency:
            groups, fired = dictionary.by_frequency, dictionary.by_density
            tenths, firing_tenths = range(1, len(groups) + 1), range(1, len(fired) + 1)
            canvas.axes[1].plot(tenths, [group.recall for group in groups], color=color, **_RECALL)
            canvas.axes[1].plot(firing_tenths, [group.precision for group in fired], color=color, **_PRECISION)
            canvas.axes[2].plot(tenths, [group.f1 for group in groups], color=color, **_RECALL)
            canvas.axes[2].plot(tenths, [group.null_f1 for group in groups], color=GREY, **_NULL)
    titles = ("recovered directions", f"recovered directions, cosine {COSINE:g}", "detection F1")
    for axes, name in zip(canvas.axes, titles, strict=False):
        title(axes, name)
        axes.set_ylim(-0.03, 1.05)
    canvas.axes[0].set_xlabel("least cosine of a recovered direction")
    for axes in canvas.axes[1:]:
        axes.set(xlabel="tenth of the features, most frequent first", xticks=range(1, 11))
    handles = [
        *(patch(d.architecture, ARCHITECTURE_COLOURS.get(d.architecture, INK)) for d in result.dictionaries),
        line("recall, F1" if by_frequency else "recall", color=INK, **_RECALL),
        line("precision", color=INK, **_PRECISION),
        line("null", color=GREY, **_NULL),
    ]
    canvas.legend("upper", handles, columns=len(handles) if by_frequency else 3)
    return canvas.png()


_FIGURES = {
    GeometryResult: _geometry,
    DimensionalityResult: _dimensionality,
    PhaseResult: _phases,
    RecoveryResult: _recovery,
}
