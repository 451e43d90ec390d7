"""A report's figures as PNG: training curves, feature densities, L0, activation norms."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.evaluation.report import Report
from sae.evaluation.sparsity import DENSE_ABOVE, SparsityScores
from sae.training.sinks import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY, _INK = "#2b6ca3", "#d97b29", "#6b7280", "#374151"
_CURVES = {
    "fvu": "fraction of variance unexplained",
    "loss": "loss",
    "l0": "L0",
    "dead": "dead features",
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}
_LOG_CURVES = ("fvu", "loss")
_COUNTS = ("l0", "dead", "tokens_per_second")


@dataclass(frozen=True)
class Figure:
    """A drawn figure: file name, what it is called, a sentence on how to read it, and the PNG's bytes."""

    file: str
    title: str
    caption: str
    png: bytes


def draw_figures(report: Report, metrics_path: Path | None = None) -> list[Figure] | None:
    """All figures there are data for; None where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    assert report.scores.sparsity is not None
    figures = [
        _density(report.scores.sparsity),
        _l0(report.scores.sparsity),
        _norms(report),
    ]
    lines = [line for line in read_metrics(metrics_path) if isinstance(line, dict)] if metrics_path is not None else []
    curves = draw_training_curves(lines)
    return [curves, *figures] if curves else figures


def draw_training_curves(lines: list[dict[str, Any]]) -> Figure | None:
    """One panel for each logged number, against tokens; None where there are fewer than two lines to draw."""
    series = {}
    for key in _CURVES:
        points = [(line.get("tokens", line.get("step")), line.get(key)) for line in lines]
        points = [(x, y) for x, y in points if _is_number(x) and _is_number(y)]
        if len(points) > 1:
            series[key] = points
    if not series:
        return None
    columns = 1 if len(series) == 1 else 2 if len(series) in (2, 4) else 3
    rows = -(-len(series) // columns)
    canvas = Canvas(rows, columns, (3.3 * columns, 2.3 * rows + 0.2))
    for axes, (key, points) in zip(canvas.axes, series.items(), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=_BLUE, linewidth=1.3, clip_on=False)
        axes.set_title(_CURVES[key], fontsize=9, loc="left", color=_INK)
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter(_engineering())
        if key in _LOG_CURVES and min(y) > 0 and max(y) / min(y) > 3:
            logarithmic(axes, "y", (min(y), max(y)))
        elif min(y) >= 0:
            axes.set_ylim(0, max(y) * 1.08 or 1)
        if key in _COUNTS:
            axes.yaxis.set_major_locator(_whole_numbers())
            axes.yaxis.set_major_formatter(_engineering())
    for axes in canvas.axes[len(series) :]:
        axes.set_visible(False)
    unit = "tokens" if all("tokens" in line for line in lines) else "steps"
    for axes in canvas.axes[max(0, len(series) - columns) : len(series)]:
        axes.set_xlabel(
            f"training {unit}",
        )
    return Figure("training.png", "Training curves", "What training logged, on training activations.", canvas.png())


def _density(sparsity: SparsityScores) -> Figure:
    edges, counts = sparsity.density_histogram()
    canvas = Canvas(1, 1, (6.4, 3.2))
    axes = canvas.axes[0]
    axes.stairs(counts, edges, fill=True, color=_BLUE, alpha=0.9)
    axes.axvline(math.log10(DENSE_ABOVE), color=_ORANGE, linewidth=1.2, linestyle="--")
    axes.set_xlim(edges[0], 0)
    axes.yaxis.set_major_locator(_whole_numbers())
    axes.yaxis.set_major_formatter(_thousands())
    axes.set_ylim(0, max(*counts, 1) * 1.18)
    axes.set_xticks(range(int(edges[0]), 1), [_power_of_ten(power) for power in range(int(edges[0]), 1)])
    axes.set_xlabel("share of tokens a feature fires on")
    axes.set_ylabel("features")
    features = len(sparsity.firings)
    axes.text(
        0.02, 0.96, f"{sparsity.dead:,} of {features:,} never fire\nin {sparsity.tokens:,} tokens",
        transform=axes.transAxes, va="top", fontsize=9, color=_GREY,
    )  # fmt: skip
    axes.text(
        0.985,
        0.96,
        f"{sparsity.dense:,} dense",
        transform=axes.transAxes,
        va="top",
        ha="right",
        fontsize=9,
        color=_ORANGE,
    )
    caption = (
        "How often features fire. Those that never do are counted in the corner; dense ones lie right of the line."
    )
    return Figure("density.png", "Feature densities", caption, canvas.png())


def _l0(sparsity: SparsityScores) -> Figure:
    counts = sparsity.l0_counts
    filled = counts.nonzero().flatten()
    first, last = int(filled[0]), int(filled[-1])
    width = max(1, -(-(last - first + 1) // 60))
    starts = list(range(first, last + 1, width))
    heights = [int(counts[start : start + width].sum()) / sparsity.tokens for start in starts]
    canvas = Canvas(1, 1, (6.4, 3.2))
    axes = canvas.axes[0]
    axes.bar(starts, heights, width=width * 0.92, align="edge" if width > 1 else "center", color=_BLUE)
    mean, median = sparsity.l0.value or 0.0, sparsity.l0_quantiles["0.5"]
    axes.axvline(mean, color=_ORANGE, linewidth=1.2, linestyle="--")
    if len(starts) < 8:
        axes.set_xlim(max(-1, first - 6), last + 6)
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.yaxis.set_major_formatter(_percent())
    axes.set_ylim(0, max(heights) * 1.18)
    axes.set_xlabel("features that fire on a token (L0)")
    axes.set_ylabel("tokens")
    axes.text(
        0.985, 0.96, f"mean {mean:.4g}, median {median:,}", transform=axes.transAxes, va="top", ha="right", fontsize=9,
        color=_ORANGE,
    )  # fmt: skip
    return Figure("l0.png", "L0 over tokens", "How many features fire on a token; the line is the mean.", canvas.png())


def _norms(report: Report) -> Figure:
    norms = report.norms
    filled = (norms.eligible + norms.masked).nonzero().flatten()
    first, last = max(0, int(filled[0]) - 2), min(len(norms.eligible), int(filled[-1]) + 3)
    edges = [10**edge for edge in norms.edges[first : last + 1].tolist()]
    canvas = Canvas(1, 1, (6.4, 3.2))
    axes = canvas.axes[0]
    kinds = (("evaluated", norms.eligible, _BLUE, report.tokens), ("masked", norms.masked, _ORANGE, report.masked))
    for label, counts, color, tokens in kinds:
        if tokens:
            heights = (counts[first:last].double() / counts.max()).tolist()
            axes.stairs(heights, edges, fill=True, color=color, alpha=0.75, label=f"{label} ({tokens:,} tokens)")
    logarithmic(axes, "x", (edges[0], edges[-1]))
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.28)
    axes.set_yticks([0, 0.5, 1])
    axes.set_xlabel("norm of the activation")
    axes.set_ylabel("tokens, against the peak of their kind")
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, loc="upper center", ncols=2)
    caption = "Norms of the tokens evaluated and of those the token policy leaves out; each kind has its own height."
    return Figure("norms.png", "Activation norms", caption, canvas.png())


class Canvas:
    """A grid of axes in the house's look, drawn without pyplot and its global state."""

    def __init__(self, rows: int, columns: int, size: tuple[float, float]) -> None:
        from matplotlib.figure import Figure as MatplotlibFigure

        self.figure = MatplotlibFigure(figsize=size, dpi=160, layout="constrained", facecolor="white")
        self.axes: list[Axes] = list(self.figure.subplots(rows, columns, squeeze=False).flat)
        for axes in self.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(_GREY)
            axes.tick_params(labelsize=8, color=_GREY, labelcolor=_INK, which="both")
            axes.xaxis.label.set(size=9, color=_INK)
            axes.yaxis.label.set(size=9, color=_INK)
            axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
            axes.set_axisbelow(True)

    def png(self) -> bytes:
        """Draw; the same figure gives the same bytes."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        content = io.BytesIO()
        FigureCanvasAgg(self.figure).print_png(content, metadata={"Software": None})
        return content.getvalue()


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=True, steps=[1, 2, 5, 10])


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0)


def _thousands() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:,.10g}")


def logarithmic(axes: Axes, which: str, limits: tuple[float, float]) -> None:
    """A log scale whose ticks are plain numbers, also between the powers of ten where the range is short."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log"})
    decades = math.log10(limits[1] / limits[0])
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(_thousands())
    axis.set_minor_formatter(NullFormatter())


def _power_of_ten(power: int) -> str:
    return f"$10^{{{power}}}$" if power else "1"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
