from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae.architectures import TopK
from sae.dictionary.codes import Codes
from sae.evaluation import evaluate
from sae.evaluation.sparsity import SparsityCounts
from tests.support.evaluation_cache import make_cache, random_rows
from tests.support.fake_cache import HOOK


def _by_hand() -> SparsityCounts:
    """Ten tokens over six features, in two blocks of different widths; padding points at feature 0."""
    counts = SparsityCounts(2, 6)
    values = torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    indices = torch.tensor([[1, 2, 3], [1, 0, 0], [0, 0, 0], [2, 1, 0]])
    counts.add_(Codes(values, indices), torch.tensor([0, 0, 0, 1]))
    counts.add_(Codes(torch.full((6, 1), 2.0), torch.tensor([[1], [1], [1], [1], [4], [1]])), torch.ones(6, dtype=int))
    return counts


def test_l0_density_dead_and_dense_by_hand() -> None:
    scores = _by_hand().scores()
    assert scores.tokens == 10
    assert scores.firings.tolist() == [0, 8, 2, 1, 1, 0]
    assert scores.density.tolist() == [0, 0.8, 0.2, 0.1, 0.1, 0]
    assert (scores.dead, scores.dense) == (2, 2)  # a tenth itself is not dense
    assert scores.l0_counts.tolist() == [1, 7, 1, 1]
    assert scores.l0.value == pytest.approx(1.2, rel=1e-15)
    assert scores.l1.value == pytest.approx((3.5 + 3 + 0 + 2 + 12) / 10, rel=1e-15)
    without = torch.tensor([8 / 7, 4 / 3], dtype=torch.float64)  # L0 of the one document, and of the other
    assert scores.l0.standard_error == pytest.approx(float((without - 1.2).square().sum().div(2).sqrt()))
    assert scores.l0_quantiles == {"0": 0, "0.05": 0, "0.25": 1, "0.5": 1, "0.75": 1, "0.95": 3, "1": 3}


def test_density_histogram_holds_every_living_feature_once() -> None:
    scores = _by_hand().scores()
    edges, counts = scores.density_histogram()
    assert edges == [-1, -0.75, -0.5, -0.25, 0]
    assert counts == [2, 1, 0, 1]  # log10 of 0.1 twice, 0.2 and 0.8
    assert sum(counts) + scores.dead == 6


def test_dead_dictionary(tmp_path: Path) -> None:
    rows = random_rows(150, 6, 9)
    dictionary = TopK(6, 24, k=3).requires_grad_(False)
    dictionary.b_enc.fill_(-1)
    dictionary.b_dec.fill_(4.0)
    report = evaluate(dictionary, make_cache(tmp_path, rows), hook=HOOK)
    scores = report.to_json()
    tokens = report.tokens
    assert (scores["l0"]["value"], scores["l0"]["standard_error"]) == (0, 0)
    assert scores["dead"] == {"features": 24, "share": 1, "tokens": tokens, "in_training": None}
    assert scores["density"]["mean"] == 0 and sum(scores["density"]["log10_histogram"]["features"]) == 0
    assert scores["relative_reconstruction_bias"]["value"] is not None  # x̂ = b_dec
    assert scores["l2_ratio"]["value"] > 0


def test_topk_fires_k_features_and_mean_density_is_l0_over_width(tmp_path: Path) -> None:
    dictionary = TopK(6, 24, k=3).requires_grad_(False)
    dictionary.W_enc.copy_(torch.randn(6, 24, generator=torch.Generator().manual_seed(0)))
    dictionary.b_enc.fill_(100)
    dictionary.metadata["trained"] = {"dead": 7, "dead_after_tokens": 1000, "tokens": 5000}
    report = evaluate(dictionary, make_cache(tmp_path, random_rows(150, 6, 9)), hook=HOOK)
    assert report.scores.sparsity is not None
    assert set(report.scores.sparsity.l0_quantiles.values()) == {3}
    assert float(report.scores.sparsity.density.sum()) == pytest.approx(3, rel=1e-14)
    assert report.to_json()["dead"]["in_training"] == {"features": 7, "tokens": 1000}
    dictionary.metadata["trained"]["tokens"] = 999  # too short a training for a feature to count as dead
    again = evaluate(dictionary, make_cache(tmp_path, random_rows(150, 6, 9)), hook=HOOK)
    assert again.to_json()["dead"]["in_training"] is None
