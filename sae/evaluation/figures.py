"""A report's figures as PNG: training curves, feature densities, L0, activation norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.evaluation.report import Report
from sae.evaluation.sparsity import DENSE_ABOVE, SparsityScores
from sae.results.figure import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    Canvas,
    drawing,
    engineering,
    logarithmic,
    percent,
    thousands,
    title,
    whole_numbers,
)
from sae.training.sinks import read_metrics

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
    """A drawn figure: file name, title, a sentence on how to read it, and the PNG's bytes."""

    file: str
    title: str
    caption: str
    png: bytes


@drawing
def draw_figures(report: Report, metrics_path: Path | None = None) -> list[Figure]:
    """All figures for which there are data; None if matplotlib is not installed."""
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
    """One panel for each logged number, against tokens; None if there are fewer than two lines to draw."""
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
        axes.plot(x, y, color=BLUE, linewidth=1.3, clip_on=False)
        title(axes, _CURVES[key])
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter(engineering())
        if key in _LOG_CURVES and min(y) > 0 and max(y) / min(y) > 3:
            logarithmic(axes, "y", (min(y), max(y)))
        elif min(y) >= 0:
            axes.set_ylim(0, max(y) * 1.08 or 1)
        if key in _COUNTS:
            axes.yaxis.set_major_locator(whole_numbers())
            axes.yaxis.set_major_formatter(engineering())
    for axes in canvas.axes[len(series) :]:
        axes.set_visible(False)
    unit = "tokens" if all("tokens" in line for line in lines) else "steps"
    for axes in canvas.axes[max(0, len(series) - columns) : len(series)]:
        axes.set_xlabel(f"training {unit}")
    return Figure("training.png", "Training curves", "What training logged, on training activations.", canvas.png())


def _density(sparsity: SparsityScores) -> Figure:
    edges, counts = sparsity.density_histogram()
    canvas = Canvas(1, 1, (6.4, 3.2))
    axes = canvas.axes[0]
    axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.9)
    axes.axvline(math.log10(DENSE_ABOVE), color=ORANGE, linewidth=1.2, linestyle="--")
    axes.yaxis.set_major_locator(whole_numbers())
    axes.yaxis.set_major_formatter(thousands())
    axes.set_xticks(range(int(edges[0]), 1), [_power_of_ten(power) for power in range(int(edges[0]), 1)])
    axes.set(
        xlim=(edges[0], 0), ylim=(0, max(*counts, 1) * 1.18),
        xlabel="share of tokens a feature fires on", ylabel="features",
    )  # fmt: skip
    features = len(sparsity.firings)
    axes.text(
        0.02, 0.96, f"{sparsity.dead:,} of {features:,} never fire\nin {sparsity.tokens:,} tokens",
        transform=axes.transAxes, va="top", fontsize=9, color=GREY,
    )  # fmt: skip
    axes.text(
        0.985,
        0.96,
        f"{sparsity.dense:,} dense",
        transform=axes.transAxes,
        va="top",
        ha="right",
        fontsize=9,
        color=ORANGE,
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
    axes.bar(starts, heights, width=width * 0.92, align="edge" if width > 1 else "center", color=BLUE)
    mean, median = sparsity.l0.value or 0.0, sparsity.l0_quantiles["0.5"]
    axes.axvline(mean, color=ORANGE, linewidth=1.2, linestyle="--")
    if len(starts) < 8:
        axes.set_xlim(max(-1, first - 6), last + 6)
    axes.xaxis.set_major_locator(whole_numbers())
    axes.yaxis.set_major_formatter(percent())
    axes.set(ylim=(0, max(heights) * 1.18), xlabel="features that fire on a token (L0)", ylabel="tokens")
    axes.text(
        0.985, 0.96, f"mean {mean:.4g}, median {median:,}", transform=axes.transAxes, va="top", ha="right", fontsize=9,
        color=ORANGE,
    )  # fmt: skip
    return Figure("l0.png", "L0 over tokens", "How many features fire on a token; the line is the mean.", canvas.png())


def _norms(report: Report) -> Figure:
    norms = report.norms
    filled = (norms.eligible + norms.masked).nonzero().flatten()
    first, last = max(0, int(filled[0]) - 2), min(len(norms.eligible), int(filled[-1]) + 3)
    edges = [10**edge for edge in norms.edges[first : last + 1].tolist()]
    canvas = Canvas(1, 1, (6.4, 3.2))
    axes = canvas.axes[0]
    kinds = (("evaluated", norms.eligible, BLUE, report.tokens), ("masked", norms.masked, ORANGE, report.masked))
    for label, counts, color, tokens in kinds:
        if tokens:
            heights = (counts[first:last].double() / counts.max()).tolist()
            axes.stairs(heights, edges, fill=True, color=color, alpha=0.75, label=f"{label} ({tokens:,} tokens)")
    logarithmic(axes, "x", (edges[0], edges[-1]))
    axes.set(
        xlim=(edges[0], edges[-1]), ylim=(0, 1.28), yticks=[0, 0.5, 1],
        xlabel="norm of the activation", ylabel="tokens, against the peak of their kind",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper center", ncols=2)
    caption = "Norms of the tokens evaluated and of those the token policy leaves out; each kind has its own height."
    return Figure("norms.png", "Activation norms", caption, canvas.png())


def _power_of_ten(power: int) -> str:
    return f"$10^{{{power}}}$" if power else "1"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
