"""The comparison of a sweep's dictionaries: its table and its figure."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re

import pytest
import torch
from rich.console import Console

from sae.evaluation.estimate import Estimate
from sae.evaluation.pareto import Point, draw_pareto
from sae.evaluation.sweep_tables import Behind, behind_best, sweep_markdown, sweep_tables


def point(architecture: str, k: int, fvu: float, seed: int = 0) -> Point:
    return Point(
        architecture, "blocks.0.hook_resid_pre", 64, k, seed, Estimate(float(k), 0.1), Estimate(fvu, 0.01),
        Estimate(fvu / 10, 0.001), 0.02, 12.0, 5_000_000, 4000,
    )  # fmt: skip


def test_the_table_gives_time_for_a_thousand_tokens_and_memory() -> None:
    text = sweep_markdown({"topk-k8": point("topk", 8, 0.25)}, {}, None)
    assert "| topk-k8 | 8.00 ± 0.10 | 0.250 ± 0.010 | 0.0250 ± 0.0010 | 2.0% | 3,000.0 | 5 |" in text


def test_the_table_has_means_over_seeds() -> None:
    points = {
        "topk-k8-seed0": point("topk", 8, 0.3), "topk-k8-seed1": point("topk", 8, 0.4, 1),
        "relu-k8-seed0": point("relu", 8, 0.5),
    }  # fmt: skip
    text = sweep_markdown(points, {}, None)
    assert "| topk, k 8 | 2 | 8 ± 0 | 0.350 ± 0.071 | 0.0350 ± 0.0071 |" in text
    assert "| relu, k 8" not in text
    assert "## Over seeds" not in sweep_markdown({"relu-k8-seed0": points["relu-k8-seed0"]}, {}, None)


def test_the_best_of_a_k_is_bold_and_what_is_no_different_from_it_is_marked() -> None:
    """Half of the first's error is the second's, document by document; the third's is the second's but for noise."""
    rng = torch.Generator().manual_seed(0)
    error = torch.rand(50, generator=rng).double() + 1
    tokens, deviation = torch.full((50,), 10.0).double(), torch.full((50,), 8.0).double()
    noise = 0.1 * torch.randn(50, generator=rng).double()
    errors = {"a": error, "b": error / 2, "c": error / 2 + noise - noise.mean() + 1e-4}
    totals = {name: {"tokens": tokens, "error": made, "deviation": deviation} for name, made in errors.items()}
    points = {name: point("topk", 8, float(made.sum() / 400)) for name, made in errors.items()}
    found = behind_best(points, totals)
    assert set(found) == {"a", "c"}
    assert found["a"]["fvu"].best == found["c"]["fvu"].best == "b"
    assert found["a"]["fvu"].difference.value == pytest.approx(float(error.sum()) / 800)
    assert "delta_ce" not in found["a"], "nobody measured it"
    text = sweep_markdown(points, {}, None, found)
    cells = {name: fvu for name, _, fvu, *_ in rows(text)}
    assert cells["b"] == f"**{points['b'].fvu}**"
    assert cells["c"] == f"{points['c'].fvu} ≈"
    assert cells["a"] == str(points["a"].fvu)
    assert (
        "**bold**: the lowest of its k. ≈: no different from it: the 95 % interval of the difference, paired over "
        "documents, holds 0." in text
    )
    assert "≈" not in sweep_markdown(points, {}, None)
    for change in ({"hook": "blocks.1.hook_resid_pre"}, {"k": 16}, {"weight": 0.5}):
        alone = {**points, "b": dataclasses.replace(points["b"], **change)}
        assert behind_best(alone, totals)["a"]["fvu"].best == "c", change
        assert set(behind_best(alone, totals)) == {"a"}, "one that stands alone is not marked"
    wider = {**points, "b": dataclasses.replace(points["b"], d_sae=128, seed=3)}
    assert set(behind_best(wider, totals)) == {"a", "c"}


def rows(text: str) -> list[list[str]]:
    """Cells of the first table."""
    lines = itertools.takewhile(lambda line: line.startswith("|"), text[text.index("| :--") :].splitlines())
    return [line.strip("| ").split(" | ") for line in list(lines)[1:]]


@pytest.mark.parametrize("width", [80, 130])
def test_a_terminal_shows_whole_names_and_values(width: int) -> None:
    points = {f"{name}-k{k}": point(name, k, 1 / k) for name in ("matryoshka", "batch_topk") for k in (8, 128)}
    points["matryoshka-k8"].baselines["pca"] = Estimate(0.4567, 0.0123)
    best = {name: {"fvu": Behind("matryoshka-k8", Estimate(0.01, 0.1))} for name in points if name != "matryoshka-k8"}
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for table in sweep_tables(points, best, width):
        console.print(table)
    styled = console.export_text(styles=True, clear=False)
    text = console.export_text()
    assert all(name in text for name in points)
    assert "…" not in text
    assert text.count("0.008 ± 0.010 ≈") == 2
    assert len(re.findall(r"\x1b\[1m *\d+\.\d+ ± \d+\.\d+", styled)) == 1, "the best alone is bold"
    assert re.search(r"\x1b\[1m *0\.125 ± 0\.010", styled)
    assert ("8.00 ± 0.10" in text) == ("0.457 ± 0.012" in text) == ("Time is that of" in text) == (width == 130)
    assert "0.457" in text


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
    nothing = dataclasses.replace(point("relu", 8, 0.5), l0=Estimate(0.0, 0.0))
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
