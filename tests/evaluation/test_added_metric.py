"""A metric is declared once: an entry in `METRICS` and a field of its scores bring it into every table and figure."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console, Group

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.settings import EvaluationConfig
from sae.evaluation import comparison_tables, evaluate_all, report_table, write_report
from sae.evaluation.comparison import Comparison
from sae.evaluation.comparison_view import comparison_markdown
from sae.evaluation.metrics import METRICS, Metric, difference
from sae.evaluation.pareto import Point, draw_pareto
from sae.evaluation.reconstruction import ReconstructionScores
from sae.evaluation.report_view import markdown
from sae.evaluation.stored import read_stored
from sae.evaluation.sweep_view import behind_best, sweep_markdown, sweep_tables
from sae.results.estimate import Estimate
from tests.support.fake_cache import HOOK

SETTINGS = EvaluationConfig(frozen_decoder_tokens=0, legacy_tokens=0)
ADDED = Metric(
    "reconstruction", "mean x·x̂", "product", "tokens", better="higher", heading="x·x̂", axis="inner product"
)  # fmt: skip


@dataclass(frozen=True)
class MoreScores(ReconstructionScores):
    """With a metric of sums that are there already."""

    inner_product: Estimate


def topk(scale: float) -> TopK:
    dictionary = TopK(32, 64, k=4).requires_grad_(False)
    directions = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    dictionary.W_dec.copy_(scale * torch.nn.functional.normalize(directions, dim=-1))
    dictionary.W_enc.copy_(dictionary.W_dec.T)
    return dictionary


def shown(*groups: Group) -> str:
    console = Console(file=io.StringIO(), width=160)
    for group in groups:
        console.print(group)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_added_metric_is_in_every_table(
    many_documents: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    monkeypatch.setitem(METRICS, "inner_product", ADDED)
    monkeypatch.setattr("sae.evaluation.reconstruction.ReconstructionScores", MoreScores)
    reports = evaluate_all(
        {"low": topk(0.5), "high": topk(1.0)}, many_documents, hook=HOOK, settings=SETTINGS
    )  # fmt: skip
    records = {name: report.to_json() for name, report in reports.items()}
    high, totals = reports["high"], {name: report.scores.totals for name, report in reports.items()}
    own = Estimate.from_json(records["high"]["inner_product"])
    truth = float(totals["high"]["product"].sum() / totals["high"]["tokens"].sum())
    assert own.value == pytest.approx(truth) and own.standard_error

    write_report(high, tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text())["baselines"]["pca"]["inner_product"]["value"] > 0
    identity, activations = high.dictionary, high.activations
    assert read_stored(tmp_path, identity, activations, hook=HOOK, settings=SETTINGS) is not None
    assert f"| `inner_product` | mean x·x̂ | {own} |" in markdown(high, None)
    assert "inner_product" in shown(report_table(records["high"]))

    compared = Comparison.of({name: (records[name], totals[name]) for name in records})
    assert compared.dictionaries["high"].differences["inner_product"].value == pytest.approx(
        truth - records["low"]["inner_product"]["value"]
    )
    assert "| `inner_product` | mean x·x̂ |" in comparison_markdown(compared)
    assert "inner_product" in shown(*comparison_tables(compared))

    points = {
        name: Point.of("topk", record, hook=HOOK, d_sae=64, k=4, seed=0, cost={}) for name, record in records.items()
    }
    assert list(points["low"].to_json())[5:10] == ["l0", "fvu", "delta_ce", "inner_product", "dead"]
    gaps = behind_best(points, totals)
    assert gaps["low"]["inner_product"].best == "high", "the larger one"
    gap = gaps["low"]["inner_product"].difference.value
    assert gap is not None and gap < 0
    text = sweep_markdown(points, {}, None, gaps)
    assert "| dictionary | L0 | FVU | x·x̂ | never fire |" in text and f"**{own}**" in text
    assert "**bold**: the best of its k." in text
    assert "x·x̂" in shown(*sweep_tables(points, gaps))
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda _, label, **how: titles.append(label))
    assert draw_pareto(list(points.values()))
    assert titles == ["fraction of variance unexplained", "inner product"]


def test_a_worse_dictionary_is_worse_by_every_metric_that_says_what_is_better() -> None:
    two = torch.ones(2, dtype=torch.float64)
    good = {"tokens": 4 * two, "positions": 4 * two, "error": two, "deviation": 8 * two, "nonzero": 4 * two,
            "cosine": 3 * two, "clean": 8 * two, "zero": 40 * two, "mean": 30 * two, "spliced": 10 * two,
            "kl": two}  # fmt: skip
    bad = {**good, "error": 2 * two, "cosine": 2 * two, "spliced": 12 * two, "kl": 2 * two}
    judged = {name: metric.better for name, metric in METRICS.items() if metric.better}
    assert set(METRICS) - judged.keys() == {
        "l2_ratio", "relative_reconstruction_bias", "l0", "l1", "ce_clean", "ce_zero", "ce_mean"
    }  # fmt: skip
    for name, better in judged.items():
        gap = difference(name, bad, good)
        assert gap is not None and gap.value
        assert (gap.value > 0) is (better == "lower"), name


def test_fields_of_scores_are_metrics() -> None:
    fields = {field.name for field in dataclasses.fields(ReconstructionScores)} - {"totals"}
    assert fields == {name for name, metric in METRICS.items() if metric.group == "reconstruction"}
