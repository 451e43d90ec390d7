"""The comparison of a sweep's dictionaries: its figure."""

from __future__ import annotations

import dataclasses

import pytest

from sae.evaluation.pareto import Point, draw_pareto
from sae.results.estimate import Estimate


def point(architecture: str, k: int, fvu: float, seed: int = 0) -> Point:
    return Point(
        architecture, "blocks.0.hook_resid_pre", 64, k, seed,
        {"l0": Estimate(float(k), 0.1), "fvu": Estimate(fvu, 0.01), "delta_ce": Estimate(fvu / 10, 0.001)},
        0.02, 12.0, 5_000_000, 4000,
    )  # fmt: skip


def measured(made: Point, **metrics: Estimate | None) -> Point:
    """The point with other values; None: not measured."""
    changed = {name: value for name, value in {**made.metrics, **metrics}.items() if value is not None}
    return dataclasses.replace(made, metrics=changed)


def test_the_figure_averages_seeds_and_has_a_line_for_each_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, tuple[tuple[float, ...], ...]] = {}
    losses: dict[str, tuple[tuple[float, ...], ...]] = {}
    original = Axes.errorbar

    def note(self: Axes, x: tuple[float, ...], y: tuple[float, ...], **how: object) -> object:
        panel = losses if str(how["label"]) in drawn else drawn
        panel[str(how["label"])] = (x, y, how["yerr"])  # type: ignore[assignment]
        return original(self, x, y, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "errorbar", note)
    points = [point("topk", 16, 0.2), point("topk", 8, 0.3, 0), point("topk", 8, 0.4, 1), point("relu", 8, 0.5)]
    assert draw_pareto(points)
    assert drawn["topk"][0] == (8.0, 16.0)
    assert drawn["topk"][1] == pytest.approx((0.35, 0.2))
    assert drawn["topk"][2] == pytest.approx((0.0707107, 0.01), rel=1e-4)
    assert drawn["relu"][:2] == ((8.0,), (0.5,))
    assert losses["topk"][0] == (8.0, 16.0)
    assert losses["topk"][1] == pytest.approx((0.035, 0.02))
    assert losses["topk"][2] == pytest.approx((0.00707107, 0.001), rel=1e-4)
    assert draw_pareto([]) is None
    nothing = measured(point("relu", 8, 0.5), l0=Estimate(0.0, 0.0))
    assert draw_pareto([nothing])
    drawn.clear(), losses.clear()
    wide = [point("topk", 8, 0.2), dataclasses.replace(point("topk", 8, 0.1), d_sae=128)]
    assert draw_pareto(wide)
    assert {label: found[1] for label, found in drawn.items()} == {"topk, 64": (0.2,), "topk, 128": (0.1,)}
    drawn.clear(), losses.clear()
    weights = [dataclasses.replace(point("relu", 8, fvu), weight=10 * fvu) for fvu in (0.2, 0.4)]
    draw_pareto(weights)
    assert drawn["relu"][1] == (0.2, 0.4), "other weights of the penalty are other places on the line, not seeds"
    drawn.clear(), losses.clear()
    rates = [dataclasses.replace(point("topk", k, 1 / k), variant=f"lr{lr}") for k in (8, 16) for lr in (0.1, 0.2)]
    draw_pareto(rates)
    line = (0.125, 0.0625)
    assert {label: found[1] for label, found in drawn.items()} == {"topk, lr0.1": line, "topk, lr0.2": line}


@pytest.mark.parametrize(
    "architectures", [("topk",), ("topk", "relu", "gated", "jumprelu", "batch_topk", "matryoshka")]
)
@pytest.mark.parametrize(
    "variants", [("",), ("lr0.1", "lr0.2", "encoder_dtype-bfloat16, initial_b_dec-geometric_median")]
)
@pytest.mark.parametrize("ks", [(32,), (8, 16, 32)])
def test_the_legend_is_below_the_axes(
    architectures: tuple[str, ...], variants: tuple[str, ...], ks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the points, even if all have one L0; and whole, with a line for every entry."""
    from sae.results.figure import Canvas

    kept: list[Canvas] = []
    original = Canvas.png
    monkeypatch.setattr(Canvas, "png", lambda self: kept.append(self) or original(self))
    points = [
        dataclasses.replace(point(name, k, 0.1 + number / 50 + 1 / k), variant=variant)
        for name in architectures
        for number, variant in enumerate(variants)
        for k in ks
    ]
    assert draw_pareto(points)
    figure = kept[0].figure
    [legend] = figure.legends
    box, page = legend.get_window_extent(), figure.bbox
    assert len(legend.get_texts()) == len(architectures) * len(variants)
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0
    for axes in figure.axes:
        assert box.y1 <= axes.get_tightbbox().y0
        assert axes.get_window_extent().height > 0.5 * 3.9 * figure.dpi
