"""The comparison of a sweep's dictionaries: its tables."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re

import pytest
import torch
from rich.console import Console

from sae.evaluation.metrics import Totals, estimate
from sae.evaluation.sweep_view import GapToBest, behind_best, sweep_markdown, sweep_tables
from sae.results.estimate import Estimate
from tests.evaluation.test_pareto import measured, point


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


def totals(error: torch.Tensor) -> Totals:
    """Sums of as many documents, of which the language model loses a tenth of the error."""
    tokens = torch.full_like(error, 10.0)
    return {
        "tokens": tokens, "error": error, "deviation": 0.8 * tokens, "positions": tokens, "clean": 3 * tokens,
        "spliced": 3 * tokens + error / 10,
    }  # fmt: skip


@pytest.fixture
def compared() -> dict[str, Totals]:
    """Half of the first's error is the second's, document by document; the third's is the second's but for noise."""
    rng = torch.Generator().manual_seed(0)
    error = torch.rand(50, generator=rng).double() + 1
    noise = 0.1 * torch.randn(50, generator=rng).double()
    return {"a": totals(error), "b": totals(error / 2), "c": totals(error / 2 + noise - noise.mean() + 1e-4)}


def test_the_best_of_a_k_is_bold_and_what_is_no_different_from_it_is_marked(compared: dict[str, Totals]) -> None:
    points = {
        name: measured(point("topk", 8, 1.0), **{of: estimate(of, made) for of in ("fvu", "delta_ce")})
        for name, made in compared.items()
    }
    found = behind_best(points, compared)
    assert set(found) == {"a", "c"}
    assert {made.best for of in found.values() for made in of.values()} == {"b"}
    assert found["a"]["fvu"].difference.value == pytest.approx(float(compared["a"]["error"].sum()) / 800)
    text = sweep_markdown(points, {}, None, found)
    cells = {name: (fvu, loss) for name, _, fvu, loss, *_ in rows(text)}
    assert cells["b"] == (f"**{points['b'].fvu}**", f"**{points['b'].delta_ce}**")
    assert cells["c"] == (f"{points['c'].fvu} ≈", f"{points['c'].delta_ce} ≈")
    assert cells["a"] == (str(points["a"].fvu), str(points["a"].delta_ce))
    assert (
        "**bold**: the lowest of its k. ≈: no different from it: the 95 % interval of the difference, paired over "
        "documents, holds 0." in text
    )
    assert [found[name]["fvu"].to_json()["below_noise"] for name in ("a", "c")] == [False, True]
    assert "≈" not in sweep_markdown(points, {}, None)
    without = {name: measured(made, delta_ce=None) for name, made in points.items()}
    assert set(behind_best(without, compared)["a"]) == {"fvu"}, "nobody measured the loss"


@pytest.mark.parametrize(
    ("change", "of"),
    [
        ({"hook": "blocks.1.hook_resid_pre"}, "hook point and k."),
        ({"k": 16}, "k."),
        ({"weight": 0.5}, "k and fixed weight of the penalty."),
    ],
)
def test_only_what_is_alike_is_compared(compared: dict[str, Totals], change: dict[str, object], of: str) -> None:
    points = {name: point("relu", 8, float(made["error"].sum())) for name, made in compared.items()}
    points["b"] = dataclasses.replace(points["b"], **change)  # type: ignore[arg-type]
    found = behind_best(points, compared)
    assert {name: made["fvu"].best for name, made in found.items()} == {"a": "c"}, "what stands alone is not marked"
    assert f"**bold**: the lowest of its {of}" in sweep_markdown(points, {}, None, found)
    wider = {**points, "b": dataclasses.replace(point("topk", 8, 0.1), d_sae=128, seed=3)}
    assert set(behind_best(wider, compared)) == {"a", "c"}
    same_number = {
        "a": dataclasses.replace(points["a"], weight=3.0),
        "c": dataclasses.replace(points["c"], weight=3.0, architecture="jumprelu"),
    }
    assert not behind_best(same_number, compared), "an L1 and an L0 penalty"


def test_what_is_not_a_number_is_not_the_best(compared: dict[str, Totals]) -> None:
    points = {name: point("topk", 8, float(made["error"].sum())) for name, made in compared.items()}
    points["a"] = measured(points["a"], fvu=Estimate(float("nan"), None))
    found = behind_best(points, compared)
    assert "fvu" not in found.get("a", {})
    assert found["c"]["fvu"].best == "b"


def test_one_document_does_not_tell_what_is_noise(compared: dict[str, Totals]) -> None:
    first = {name: {key: sums[:1] for key, sums in made.items()} for name, made in compared.items()}
    points = {name: point("topk", 8, float(made["error"].sum())) for name, made in first.items()}
    text = sweep_markdown(points, {}, None, behind_best(points, first))
    assert "**bold**: the lowest of its k. One document cannot show what is noise." in text
    assert "≈" not in text
    twins = dict.fromkeys(first, first["b"])
    points = dict.fromkeys(twins, points["b"])
    cells = [fvu for _, _, fvu, *_ in rows(sweep_markdown(points, {}, None, behind_best(points, twins)))]
    assert cells == [f"**{points['b'].fvu}**", f"{points['b'].fvu} ≈", f"{points['b'].fvu} ≈"]


def rows(text: str) -> list[list[str]]:
    """Cells of the first table."""
    lines = itertools.takewhile(lambda line: line.startswith("|"), text[text.index("| :--") :].splitlines())
    return [line.strip("| ").split(" | ") for line in list(lines)[1:]]


@pytest.mark.parametrize("width", [80, 130])
def test_a_terminal_shows_whole_names_and_values(width: int) -> None:
    points = {f"{name}-k{k}": point(name, k, 1 / k) for name in ("matryoshka", "batch_topk") for k in (8, 128)}
    points["matryoshka-k8"].baselines["pca"] = Estimate(0.4567, 0.0123)
    best = {
        name: {"fvu": GapToBest("matryoshka-k8", Estimate(0.01, 0.1))} for name in points if name != "matryoshka-k8"
    }
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for table in sweep_tables(points, best, width):
        console.print(table)
    styled = console.export_text(styles=True, clear=False)
    text = console.export_text()
    assert all(name in text for name in points)
    assert "…" not in text
    assert text.count("0.125 ± 0.010 *") == text.count("0.125 ± 0.010 ≈") == 1
    assert text.count("0.008 ± 0.010 ≈") == 2
    assert "*: the lowest of its k. ≈: no different from it" in text
    assert len(re.findall(r"\x1b\[1m *\d+\.\d+ ± \d+\.\d+", styled)) == 1, "the best alone is bold"
    assert ("Time is that of" in text) == (width == 130)
    assert "8.00 ± 0.10" in text and "0.457 ± 0.012" in text
    assert "0.457" in text
    assert not sweep_tables({}, {}, width)
