"""The figure of effects: measured against direct change of the loss, per feature and per place, with the nulls."""

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
    """A panel of feature means and a panel of single places, as PNG.

    None if matplotlib is not installed, or there is no direct effect to draw.
    """
    finite = changes.at(np.isfinite(changes.direct))
    fires, random = finite.at(finite.kind == FIRING), finite.at(finite.kind == RANDOM)
    if not len(fires):
        return None
    canvas = Canvas(1, 2, (9.6, 4.6))
    _panel(canvas.axes[0], _means(fires), _means(random), effects.over_features, "features")
    _panel(canvas.axes[1], _some(fires), _some(random), effects.over_positions, "places")
    return canvas.png()


@dataclass(frozen=True)
class _Dots:
    """Direct and measured changes of the loss."""

    direct: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]


def _panel(axes: Axes, dots: _Dots, null: _Dots, correlation: Correlation | None, name: str) -> None:
    """Draw both axes on the same symmetric scale, linear near zero and logarithmic outside."""
    sizes = np.abs(np.concatenate([dots.direct, dots.loss]))
    most = float(sizes.max()) or 1.0
    linear = 10.0 ** round(math.log10(max(float(np.median(sizes)), most * 1e-4)))  # keeps ticks apart
    for axis in ("x", "y"):
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=linear, linscale=1.0)
    axes.plot([-most, 0, most], [-most, 0, most], color=GREY, linewidth=0.8, linestyle="--")
    for points, colour, label in ((null, ORANGE, "random direction"), (dots, BLUE, "feature")):
        axes.scatter(points.direct, points.loss, s=9, linewidths=0, alpha=0.55, color=colour, label=label)
    limits = -1.4 * most, 1.4 * most
    labels = {"xlabel": "direct change of the loss, nats", "ylabel": "measured change of the loss, nats"}
    axes.set(xlim=limits, ylim=limits, **labels)
    note = "" if correlation is None or correlation.value is None else f", r = {correlation.value:.2f}"
    title(axes, f"{name}{note}")
    axes.legend(
        frameon=False, fontsize=8, labelcolor=INK, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2,
        borderaxespad=0.1, handletextpad=0.1, columnspacing=1.0,
    )  # fmt: skip


def _means(changes: Changes) -> _Dots:
    """The mean of each feature."""
    _, feature, count = np.unique(changes.feature, return_inverse=True, return_counts=True)
    return _Dots(*(np.bincount(feature, weights=column) / count for column in (changes.direct, changes.loss)))


def _some(changes: Changes) -> _Dots:
    """Evenly spaced places, at most `_MOST_DOTS`: more cannot be told apart."""
    step = -(-len(changes) // _MOST_DOTS) or 1
    return _Dots(changes.direct[::step], changes.loss[::step])
