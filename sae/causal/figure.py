"""The figure of effects: measured against direct change of the loss, by feature and by place, beside the nulls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from sae.causal.changes import FIRING, RANDOM, Changes
from sae.causal.effects import Correlation, Effects
from sae.evaluation.figures import Canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_FOLDER = "figures"
_BLUE, _ORANGE, _GREY = "#2b6ca3", "#d97b29", "#6b7280"
_MOST_DOTS = 5000


def draw_effects(effects: Effects, changes: Changes) -> bytes | None:
    """A panel of features' means and one of single places, as PNG.

    None where matplotlib is not installed, or there is no direct effect to draw.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    known = changes.at(np.isfinite(changes.direct))
    fires, random = known.at(known.kind == FIRING), known.at(known.kind == RANDOM)
    if not len(fires):
        return None
    canvas = Canvas(1, 2, (9.6, 4.6))
    _panel(canvas.axes[0], *_means(fires), *_means(random), effects.over_features, "means of features")
    places = (fires.direct, fires.loss, random.direct, random.loss)
    _panel(canvas.axes[1], *map(_some, places), effects.over_positions, "single places")
    return canvas.png()


def _panel(
    axes: Axes, direct: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"],
    random_direct: Float[np.ndarray, " m"], random_loss: Float[np.ndarray, " m"], correlation: Correlation | None,
    title: str,
) -> None:  # fmt: skip
    """Both axes in one symmetric scale, linear in the middle and logarithmic outside."""
    everything = np.abs(np.concatenate([direct, loss]))
    most = float(everything.max()) or 1.0
    linear = max(float(np.quantile(everything, 0.5)), most * 1e-4)
    for axis in ("x", "y"):
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=linear, linscale=1.0)
        getattr(axes, f"set_{axis}lim")(-1.4 * most, 1.4 * most)
    axes.plot([-most, 0, most], [-most, 0, most], color=_GREY, linewidth=0.8, linestyle="--")
    dots = {"s": 9, "linewidths": 0, "alpha": 0.55}
    axes.scatter(direct, loss, color=_BLUE, label="feature", **dots)
    axes.scatter(random_direct, random_loss, color=_ORANGE, label="random direction as long", **dots)
    axes.set_xlabel("direct change of the loss, nats")
    axes.set_ylabel("measured change of the loss, nats")
    note = "" if correlation is None or correlation.value is None else f", r = {correlation.value:.2f}"
    axes.set_title(f"{title}{note}", fontsize=9, loc="left", color="#374151")
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc="lower right", labelcolor="#374151")


def _means(changes: Changes) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean direct and mean measured change of each feature."""
    _, of, count = np.unique(changes.feature, return_inverse=True, return_counts=True)
    direct, loss = (np.bincount(of, weights=column) / count for column in (changes.direct, changes.loss))
    return direct, loss


def _some(column: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Evenly spaced entries, no more than can be told apart."""
    return column[:: -(-len(column) // _MOST_DOTS) or 1]
