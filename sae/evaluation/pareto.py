"""The Pareto figure: error and language-model loss of dictionaries against L0."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sae.architectures import ARCHITECTURES
from sae.evaluation.metrics import METRICS, swept
from sae.results.estimate import Estimate
from sae.results.figure import INK, SERIES, Canvas, drawing, logarithmic, title

ARCHITECTURE_COLOURS = dict(zip(ARCHITECTURES, SERIES, strict=False))
"""Colours of the architectures in all figures, in the order of the registry; others are drawn in `INK`."""
_KEY_WIDTH, _LETTER_WIDTH, _LINE_HEIGHT = 0.6, 0.065, 0.18
"""Sizes in the legend, in inches."""


@dataclass(frozen=True)
class Point:
    """One evaluated dictionary.

    Attributes:
        architecture, hook, d_sae, k, seed: what it is.
        weight: the fixed weight of the penalty, if L0 is not steered to k.
        variant: the other settings that differ in the sweep.
        metrics: those of a sweep's tables that were measured, with standard errors over documents.
        dead: share of the features that never fired on the evaluated tokens.
        seconds: spent in its own training steps; None if unknown.
        bytes: of weights and optimiser during training; None if unknown.
        tokens: number trained on in these seconds.
        baselines: FVU of each baseline, by its name in `eval.json`.
    """

    architecture: str
    hook: str
    d_sae: int
    k: int
    seed: int
    metrics: dict[str, Estimate]
    dead: float
    seconds: float | None = None
    bytes: int | None = None
    tokens: int | None = None
    weight: float | None = None
    variant: str = ""
    baselines: dict[str, Estimate] = field(default_factory=dict)

    @staticmethod
    def of(
        architecture: str, report: Mapping[str, Any], *, hook: str, d_sae: int, k: int, seed: int,
        cost: Mapping[str, Any], weight: float | None = None, variant: str = "",
    ) -> Point:  # fmt: skip
        """From the content of an `eval.json` and the cost of training."""

        def estimate(name: str, of: Mapping[str, Any] = report) -> Estimate:
            return Estimate.from_json(of[name])

        metrics = {
            name: estimate(name) for name, metric in swept().items() if metric.group != "losses" or report.get(name)
        }
        return Point(
            architecture, hook, d_sae, k, seed, metrics, report["dead"]["share"],
            cost.get("seconds"), cost.get("bytes"), cost.get("tokens"), weight, variant,
            {name: estimate("fvu", baseline) for name, baseline in report["baselines"].items()},
        )  # fmt: skip

    @property
    def l0(self) -> Estimate:
        """Features that fire per token."""
        return self.metrics["l0"]

    @property
    def fvu(self) -> Estimate:
        """The fraction of variance unexplained."""
        return self.metrics["fvu"]

    @property
    def delta_ce(self) -> Estimate | None:
        """The language model's loss above the clean one; None without a language model."""
        return self.metrics.get("delta_ce")

    def to_json(self) -> dict[str, Any]:
        """The fields, with the metrics among them; null for those not measured."""
        record = {}
        for name, value in asdict(self).items():
            record |= dict.fromkeys(swept()) | value if name == "metrics" else {name: value}
        return record


@drawing
def draw_pareto(points: Sequence[Point]) -> bytes | None:
    """The metrics with an axis, FVU and ΔCE, against L0, as PNG.

    There is a line for each architecture and for each setting that differs, except k, the penalty's fixed weight and
    the seed; it shows means over seeds. Error bars are standard deviations over seeds if there are several, else
    standard errors over documents. None if matplotlib is not installed or there is nothing to draw.
    """
    if not points:
        return None
    labels = {
        name: metric.axis
        for name, metric in METRICS.items()
        if metric.axis and any(name in point.metrics for point in points)
    }
    groups, width = lines(points), 4.6 * len(labels)
    columns = max(1, min(len(groups), int(width / (_KEY_WIDTH + _LETTER_WIDTH * max(map(len, groups))))))
    canvas = Canvas(1, len(labels), (width, 3.9 + _LINE_HEIGHT * -(-len(groups) // columns)))
    keys: dict[str, Any] = {}
    for axes, metric in zip(canvas.axes, labels, strict=True):
        values: list[float] = []
        positions: list[float] = []
        for number, (label, series) in enumerate(groups.items()):
            averages = [average for seeds in series if (average := _average(seeds, metric)) is not None]
            if not averages:
                continue
            x, y, error = zip(*sorted(averages), strict=True)
            keys[label] = axes.errorbar(
                x, y, yerr=error, label=label, linewidth=1.4, markersize=4.5,
                color=ARCHITECTURE_COLOURS.get(series[0][0].architecture, INK),
                marker="osD^vP*X"[number % 8], capsize=2.5, elinewidth=0.9,
            )  # fmt: skip
            values += y
            positions += x
        if not positions:
            continue
        logarithmic(axes, "x", (min(positions), max(positions)))
        if min(values) > 0 and max(values) / min(values) > 3:
            logarithmic(axes, "y", (min(values), max(values)))
        axes.set_xlabel("features that fire per token (L0)")
        title(axes, labels[metric])
    if keys:
        canvas.legend("lower", keys.values(), columns=columns)
    return canvas.png()


def lines(points: Sequence[Point]) -> dict[str, list[list[Point]]]:
    """Lines by label, along k or the penalty's weight; each place holds the points that differ only in the seed."""
    hooks, widths = {point.hook for point in points}, {point.d_sae for point in points}
    groups: dict[str, dict[tuple[Any, ...], list[Point]]] = {}
    for point in points:
        label = point.architecture
        label += f", {point.d_sae:,}" if len(widths) > 1 else ""
        label += f", {point.hook}" if len(hooks) > 1 else ""
        label += f", {point.variant}" if point.variant else ""
        groups.setdefault(label, {}).setdefault((point.k, point.weight), []).append(point)
    return {label: list(series.values()) for label, series in groups.items()}


def _average(seeds: list[Point], metric: str) -> tuple[float, float, float] | None:
    """Mean L0, mean of the metric, and its spread."""
    values, l0 = values_of(seeds, metric), [value for value in values_of(seeds, "l0") if value]
    if not values or not l0:
        return None
    errors = [point.metrics[metric].standard_error for point in seeds if metric in point.metrics]
    spread = statistics.stdev(values) if len(values) > 1 else errors[0] or 0.0
    return statistics.mean(l0), statistics.mean(values), spread


def values_of(points: Sequence[Point], metric: str) -> list[float]:
    """Values of the points for which the metric was measured."""
    estimates = [point.metrics[metric] for point in points if metric in point.metrics]
    return [estimate.value for estimate in estimates if estimate.value is not None]
