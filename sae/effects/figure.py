"""The figure of effects: measured against direct change of the loss, by feature and by place, beside the nulls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from sae.effects.effects import Correlation, Effects
from sae.effects.interventions import FIRING, RANDOM, Changes
from sae.results.figure import BLUE, GREY, INK, ORANGE, Canvas, drawing, title

if TYPE_CHECKING:
    from sae.results.figure import Axes

FIGURE_FOLDER = "figures"
_MOST_DOTS = 2000


@drawing
def draw_effects(effects: Effects, changes: Changes) -> bytes | None:
    """A panel of features' means and one of single places, as PNG.

    None if matplotlib is not installed, or there is no direct effect to draw.
    """
    known = changes.at(np.isfinite(changes.direct))
    fires, random = known.at(known.kind == FIRING), known.at(known.kind == RANDOM)
    if not len(fires):
        return None
    canvas = Canvas(1, 2, (9.6, 4.6))
    _panel(canvas.axes[0], _means(fires), _means(random), effects.over_features, "features")
    _panel(canvas.axes[1], _some(fires), _some(random), effects.over_positions, "places")
    return canvas.png()


@dataclass(frozen=True)
class _Dots:
    """Changes of the loss, direct and measured."""

    direct: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]


def _panel(axes: Axes, dots: _Dots, null: _Dots, correlation: Correlation | None, name: str) -> None:
    """Both axes in one symmetric scale, linear in the middle and logarithmic outside."""
    everything = np.abs(np.concatenate([dots.direct, dots.loss]))
    most = float(everything.max()) or 1.0
    linear = 10.0 ** round(math.log10(max(float(np.median(everything)), most * 1e-4)))  # ticks apart
    for axis in ("x", "y"):
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=linear, linscale=1.0)
        getattr(axes, f"set_{axis}lim")(-1.4 * most, 1.4 * most)
    axes.plot([-most, 0, most], [-most, 0, most], color=GREY, linewidth=0.8, linestyle="--")
    for some, colour, label in ((null, ORANGE, "random direction"), (dots, BLUE, "feature")):
        axes.scatter(some.direct, some.loss, s=9, linewidths=0, alpha=0.55, color=colour, label=label)
    axes.set_xlabel("direct change of the loss, nats")
    axes.set_ylabel("measured change of the loss, nats")
    note = "" if correlation is None or correlation.value is None else f", r = {correlation.value:.2f}"
    title(axes, f"{name}{note}")
    axes.legend(
        frameon=False, fontsize=8, labelcolor=INK, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2,
        borderaxespad=0.1, handletextpad=0.1, columnspacing=1.0,
    )  # fmt: skip


def _means(changes: Changes) -> _Dots:
    """Means of each feature."""
    _, of, count = np.unique(changes.feature, return_inverse=True, return_counts=True)
    return _Dots(*(np.bincount(of, weights=column) / count for column in (changes.direct, changes.loss)))


def _some(changes: Changes) -> _Dots:
    """Evenly spaced ones, no more than can be told apart."""
    step = -(-len(changes) // _MOST_DOTS) or 1
    return _Dots(changes.direct[::step], changes.loss[::step])
