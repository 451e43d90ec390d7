"""The experiments' figures as PNG: features in the plane, dimensionality, phases, recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae.evaluation.figures import Canvas, logarithmic
from sae.evaluation.pareto import COLOURS
from sae.superposition.dictionaries import COSINE, RecoveryResult
from sae.superposition.experiments import DimensionalityResult, GeometryResult, PhaseResult
from sae.superposition.phases import AWAY, PHASES

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _RED, _GREY, _INK, _PALE = "#2b6ca3", "#d97b29", "#be123c", "#6b7280", "#374151", "#e5e7eb"
_FEATURES = ("#2b6ca3", "#d97b29", "#3b8a4f", "#9d3c8a", "#be123c", "#6b7280", "#0f766e", "#b45309")
_PHASE_COLOURS = ("#e5e7eb", "#2b6ca3", "#d97b29")
_RECALL: dict[str, Any] = {"marker": "o", "linestyle": "-", "markersize": 4}
_PRECISION: dict[str, Any] = {"marker": "s", "linestyle": ":", "markersize": 3.5}
_NULL: dict[str, Any] = {"linestyle": "--", "linewidth": 1}
_POLYTOPES = {"tetrahedron 3/4": 3 / 4, "triangle 2/3": 2 / 3, "pair 1/2": 1 / 2, "pentagon 2/5": 2 / 5}


def draw(result: Any) -> bytes | None:
    """A result's figure; None where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    return _FIGURES[type(result)](result)


def _geometry(result: GeometryResult) -> bytes:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle

    canvas = Canvas(1, len(result.models), (1.75 * len(result.models), 2.5))
    for axes, model in zip(canvas.axes, result.models, strict=True):
        _bare(axes)
        axes.add_patch(Circle((0, 0), 1, fill=False, color=_PALE, linewidth=1))
        for number, (x, y) in enumerate(model.W):
            color = _FEATURES[number % len(_FEATURES)]
            axes.plot([0, x], [0, y], color=color, linewidth=1.6, solid_capstyle="round")
            axes.plot([x], [y], "o", color=color, markersize=4.5)
        axes.set_xlim(-1.35, 1.35)
        axes.set_ylim(-1.35, 1.35)
        axes.set_aspect("equal")
        axes.set_title(f"density {model.density:g}", fontsize=9, color=_INK)
    handles = [
        Line2D([], [], color=color, marker="o", markersize=4.5, label=f"importance {importance:.2f}")
        for color, importance in zip(_FEATURES, result.importance, strict=False)
    ]
    canvas.figure.legend(
        handles=handles, frameon=False, fontsize=8, labelcolor=_INK, loc="outside lower center", ncols=len(handles)
    )
    return canvas.png()


def _dimensionality(result: DimensionalityResult) -> bytes:
    canvas = Canvas(1, 1, (6.8, 3.8))
    axes = canvas.axes[0]
    x = [1 / p for p in result.densities]
    for at, numbers in zip(x, result.dimensionality, strict=True):
        axes.plot([at] * len(numbers), numbers, "o", color=_BLUE, markersize=2.6, alpha=0.25, markeredgewidth=0)
    axes.plot([], [], "o", color=_BLUE, markersize=3, label="dimensionality of a feature")
    axes.plot(x, result.dimensions_per_feature, color=_ORANGE, linewidth=1.6, label="m / ‖W‖²")
    canvas.figure.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="outside upper center", ncols=2)
    logarithmic(axes, "x", (x[0], x[-1]))
    axes.set_xlim(x[0] / 1.1, x[-1] * 1.1)
    axes.set_ylim(-0.02, 1.08)
    axes.grid(False)
    for label, height in _POLYTOPES.items():
        axes.axhline(height, color=_GREY, linewidth=0.7, linestyle="--")
        axes.text(1.01, height, label, transform=axes.get_yaxis_transform(), fontsize=8, color=_GREY, va="center")
    axes.set_xlabel("1 / density")
    axes.set_ylabel("dimensions")
    return canvas.png()


def _phases(result: PhaseResult) -> bytes:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    canvas = Canvas(1, 2, (8.2, 3.9))
    colours, norm = ListedColormap(_PHASE_COLOURS), BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3)
    for axes, title, cells in zip(canvas.axes, ("trained", "analytic"), (result.trained, result.analytic), strict=True):
        axes.pcolormesh(
            [1 / p for p in result.densities], result.importances, list(zip(*cells, strict=True)), cmap=colours,
            norm=norm, shading="nearest", edgecolors="white", linewidth=0.3,
        )  # fmt: skip
        axes.grid(False)
        logarithmic(axes, "x", (1 / result.densities[0], 1 / result.densities[-1]))
        logarithmic(axes, "y", (result.importances[0], result.importances[-1]))
        axes.set_xlabel("1 / density")
        axes.set_title(title, fontsize=9, loc="left", color=_INK)
    canvas.axes[0].set_ylabel("importance of the last feature")
    near, differ = [], []
    for row, p in enumerate(result.densities):
        for column, importance in enumerate(result.importances):
            if result.margin[row][column] < AWAY:
                near.append((1 / p, importance))
            if result.trained[row][column] != result.analytic[row][column]:
                differ.append((1 / p, importance))
    legend: list[Artist] = [
        Patch(color=colour, label=phase) for colour, phase in zip(_PHASE_COLOURS, PHASES, strict=True)
    ]
    for axes, places, marker, color, label in (
        (canvas.axes[1], near, ".", _INK, f"margin below {AWAY:g}"),
        (canvas.axes[0], differ, "x", _RED, "not as analytic"),
    ):
        style = {"marker": marker, "color": color, "linestyle": "none", "markersize": 5}
        axes.plot([x for x, _ in places], [y for _, y in places], **style)
        legend.append(Line2D([], [], label=label, **style))
    canvas.figure.legend(
        handles=legend, frameon=False, fontsize=9, labelcolor=_INK, loc="outside upper center", ncols=5
    )
    return canvas.png()


def _recovery(result: RecoveryResult) -> bytes:
    by_frequency = len({group.frequency for group in result.dictionaries[0].by_frequency}) > 1
    canvas = Canvas(1, 3 if by_frequency else 1, (10.2 if by_frequency else 4.6, 3.3))
    for made in result.dictionaries:
        color, thresholds = COLOURS.get(made.architecture, _INK), list(made.scores.recall)
        canvas.axes[0].plot(thresholds, list(made.scores.recall.values()), color=color, **_RECALL)
        canvas.axes[0].plot(thresholds, list(made.scores.precision.values()), color=color, **_PRECISION)
        canvas.axes[0].plot(thresholds, list(made.null.recall.values()), color=_GREY, **_NULL)
        if by_frequency:
            groups, fired = made.by_frequency, made.by_density
            tenths, firing_tenths = range(1, len(groups) + 1), range(1, len(fired) + 1)
            canvas.axes[1].plot(tenths, [group.recall for group in groups], color=color, **_RECALL)
            canvas.axes[1].plot(firing_tenths, [group.precision for group in fired], color=color, **_PRECISION)
            canvas.axes[2].plot(tenths, [group.f1 for group in groups], color=color, **_RECALL)
            canvas.axes[2].plot(tenths, [group.null_f1 for group in groups], color=_GREY, **_NULL)
    titles = ("recovered directions", f"recovered directions, cosine {COSINE:g}", "detection F1")
    for axes, title in zip(canvas.axes, titles, strict=False):
        axes.set_title(title, fontsize=9, loc="left", color=_INK)
        axes.set_ylim(-0.03, 1.05)
    canvas.axes[0].set_xlabel("cosine from which on a direction counts as found")
    for axes in canvas.axes[1:]:
        axes.set_xlabel("tenth of the features, most frequent first")
        axes.set_xticks(range(1, 11))
    _recovery_legend(canvas, [made.architecture for made in result.dictionaries])
    return canvas.png()


def _recovery_legend(canvas: Canvas, architectures: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Patch(color=COLOURS.get(name, _INK), label=name) for name in architectures]
    handles += [Line2D([], [], color=_INK, label="recall" if len(canvas.axes) == 1 else "recall, F1", **_RECALL)]
    handles += [Line2D([], [], color=_INK, label="precision", **_PRECISION)]
    handles += [Line2D([], [], color=_GREY, label="null", **_NULL)]
    canvas.figure.legend(
        handles=handles, frameon=False, fontsize=8, labelcolor=_INK, loc="outside upper center",
        ncols=3 if len(canvas.axes) == 1 else len(handles),
    )  # fmt: skip


def _bare(axes: Axes) -> None:
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


_FIGURES = {
    GeometryResult: _geometry,
    DimensionalityResult: _dimensionality,
    PhaseResult: _phases,
    RecoveryResult: _recovery,
}
