"""Baselines of transcoders against NumPy's least squares, the model's own weights, and spliced dictionaries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.settings import EvaluationConfig
from sae.config.splits import TRAIN
from sae.dictionary.frame import Frame
from sae.dictionary.saved import identify
from sae.errors import ConfigError
from sae.evaluation import compare, comparison_tables, evaluate, evaluate_all, write_report
from sae.evaluation.budget import announcement
from sae.evaluation.comparison_view import comparison_markdown
from sae.evaluation.held_out import training_blocks
from sae.evaluation.linear_maps import LeastSquares
from sae.evaluation.pareto import Point
from sae.evaluation.report import JSON_FILE
from sae.evaluation.report_view import markdown
from sae.evaluation.stored import read_stored
from sae.evaluation.sweep_view import sweep_markdown
from sae.files.writing import write_json
from sae.model.language_model import LanguageModel
from tests.evaluation.test_transcoders import eligible_rows, spliced_loss
from tests.support.affine_maps import affine, ridge_by_hand

READS, HIDDEN, GIVES = "blocks.1.hook_resid_mid", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"
SETTINGS = EvaluationConfig(frozen_decoder_tokens=64)


@pytest.fixture(scope="module")
def cache(short_documents) -> ActivationCache:
    """Float32, what an MLP reads, has inside and gives; inside are 128 numbers, outside 32. Read only."""
    return short_documents(8, data__held_out_tokens=246, harvest__hooks=[READS, HIDDEN, GIVES])


def make(cache: ActivationCache, reads: str = READS, *, skip: bool = False, seed: int = 0) -> TopK:
    """A transcoder to GIVES with random weights."""
    metadata = {"hook": reads, "target_hook": GIVES, "tokens": cache.policy.to_json()}
    dictionary = TopK(cache.d_in(reads), 64, k=4, metadata=metadata)
    dictionary.set_frame(Frame(skip=skip, d_out=cache.d_in(GIVES)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in dictionary.requires_grad_(False).parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return dictionary


def test_a_transcoder_without_hook_points_is_not_evaluated_as_an_autoencoder(cache: ActivationCache) -> None:
    transcoder = TopK(32, 64, k=4).requires_grad_(False)
    transcoder.set_frame(Frame(d_out=32))
    message = f"hook '{GIVES}': the dictionary is a transcoder, and which other one it reads is unknown; give both"
    with pytest.raises(ConfigError, match=message):
        evaluate(transcoder, cache, hook=GIVES, settings=SETTINGS)
    transcoder.metadata = {"hook": GIVES}
    with pytest.raises(ConfigError, match="which other one it gives is unknown"):
        evaluate(transcoder, cache, hook=GIVES, settings=SETTINGS)
    transcoder.metadata = {"hook": READS, "target_hook": GIVES}
    assert "linear" in evaluate(transcoder, cache, hook=GIVES, settings=SETTINGS).baselines


def training_rows(cache: ActivationCache, hook: str) -> np.ndarray:
    return torch.cat(list(training_blocks(cache, hook, cache.rows(TRAIN)))).double().numpy()


def fvu(y: np.ndarray, y_hat: np.ndarray) -> float:
    return float(((y - y_hat) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())


def test_sums_give_the_least_squares_solution_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 50 + torch.randn(300, 7, generator=generator, dtype=torch.float64)
    y = torch.randn(300, 5, generator=generator, dtype=torch.float64) + x[:, :5] - 2000
    fit = LeastSquares()
    for part in torch.arange(300).tensor_split(4):
        fit.add_(x[part], y[part])
    fit.add_(x[:0], y[:0])
    expected = affine(x.numpy(), y.numpy())
    map = fit.solve()
    np.testing.assert_allclose(map.W.numpy(), expected[:-1], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(map(x).numpy(), x.numpy() @ expected[:-1] + expected[-1], rtol=1e-11)
    assert fit.tokens == 300


@pytest.mark.parametrize("rows", [320, 640])
def test_directions_in_which_nothing_varies_get_no_weight(rows: int) -> None:
    """Repeated, constant and missing directions: the best map of the smallest norm, as the pseudo-inverse gives it."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(rows, 3, generator=generator)
    x = torch.cat([base, base[:, :1], torch.full((rows, 1), 7.0), 2 * base[:, 1:2], torch.zeros(rows, 1)], 1)
    y = base[:, :2] + 0.01 * torch.randn(rows, 2, generator=generator)
    fit = LeastSquares()
    fit.add_(x, y)
    map = fit.solve()
    centred_x, centred_y = ((part.double() - part.double().mean(0)).numpy() for part in (x, y))
    np.testing.assert_allclose(map.W.numpy(), np.linalg.pinv(centred_x, rcond=1e-6) @ centred_y, atol=1e-8)
    assert map.W[4].abs().max() < 1e-8 and map.W[6].abs().max() < 1e-8


@pytest.mark.parametrize(("rows", "most"), [(100, 1.05), (400, 1.0), (600, 0.95), (2000, 0.9), (20_000, 0.71)])
def test_from_few_tokens_it_is_no_worse_than_the_mean(rows: int, most: float) -> None:
    """400 numbers in x, on fresh tokens; half of the variance of y is noise. Least squares gives up to 100 and more."""
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(400, 20, generator=generator, dtype=torch.float64) / 20

    def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, 400, generator=generator, dtype=torch.float64)
        return x, x @ W + torch.randn(count, 20, generator=generator, dtype=torch.float64)

    (x, y), (fresh, expected) = tokens(rows), tokens(2000)
    fit = LeastSquares()
    for part in torch.arange(rows).split(150):
        fit.add_(x[part], y[part])
    map = fit.solve()
    assert fvu(expected.numpy(), map(fresh).numpy()) < most
    weights = affine(x.numpy(), y.numpy())
    plain = fvu(expected.numpy(), fresh.numpy() @ weights[:-1] + weights[-1])
    assert plain > 1 if rows < 700 else fvu(expected.numpy(), map(fresh).numpy()) < plain + 0.002
    ridge = ridge_by_hand(x.numpy(), y.numpy())
    np.testing.assert_allclose(map(fresh).numpy(), fresh.numpy() @ ridge[:-1] + ridge[-1], rtol=1e-7, atol=1e-7)
    [first, second] = fit.solve_each([5, 15])
    alone = LeastSquares()
    alone.add_(x, y[:, 5:])
    np.testing.assert_allclose(second.W.numpy(), alone.solve().W.numpy(), rtol=1e-7, atol=1e-9)
    assert first.W.shape == (400, 5) and first.mean_y.shape == (5,)


def test_what_never_varies_is_its_mean() -> None:
    fit = LeastSquares()
    fit.add_(torch.ones(5, 3), torch.arange(5.0)[:, None])
    map = fit.solve()
    assert not map.W.any() and map(torch.zeros(2, 3, dtype=torch.float64)).tolist() == [[2.0], [2.0]]


def test_both_maps_are_those_of_plain_numpy(cache: ActivationCache) -> None:
    transcoder = make(cache, skip=True)
    report = evaluate(transcoder, cache, settings=SETTINGS)
    assert list(report.baselines) == ["pca", "linear", "skip", "identity"]
    (x, _), (y, _) = (eligible_rows(cache, hook) for hook in (READS, GIVES))
    x, y = x.double().numpy(), y.double().numpy()
    train_x, train_y = (training_rows(cache, hook) for hook in (READS, GIVES))
    weights = ridge_by_hand(train_x, train_y)
    assert transcoder.W_skip is not None
    W_skip = transcoder.W_skip.double().numpy()
    expected = {
        "linear": fvu(y, x @ weights[:-1] + weights[-1]),
        "skip": fvu(y, x @ W_skip + (train_y - train_x @ W_skip).mean(0)),
    }
    for name, value in expected.items():
        assert report.baselines[name].reconstruction.fvu.value == pytest.approx(value, rel=1e-4), name
        assert report.baselines[name].sparsity is None
    assert 0.001 < expected["linear"] < 1 < expected["skip"]
    assert f"fitted on {len(train_x):,} tokens" in report.baselines["linear"].description


def test_inside_an_mlp_the_best_map_is_the_models_own(cache: ActivationCache, language_model: LanguageModel) -> None:
    """What it gives is affine in what is inside, of another width: nothing is left, and losses are the clean ones."""
    report = evaluate(make(cache, HIDDEN), cache, language_model=language_model, settings=SETTINGS)
    linear = report.baselines["linear"]
    assert linear.reconstruction.fvu.value == pytest.approx(0, abs=1e-9)
    assert linear.downstream is not None
    assert linear.downstream.kl.value == pytest.approx(0, abs=1e-6)
    fit, c_proj = LeastSquares(), language_model.hf_model.transformer.h[1].mlp.c_proj
    fit.add_(*(torch.from_numpy(training_rows(cache, hook)) for hook in (HIDDEN, GIVES)))
    np.testing.assert_allclose(fit.solve().W.numpy(), c_proj.weight.numpy(), atol=2e-3)


def test_losses_are_those_of_spliced_dictionaries_without_features(
    cache: ActivationCache, language_model: LanguageModel
) -> None:
    transcoder = make(cache, skip=True, seed=1)
    settings = EvaluationConfig(frozen_decoder_tokens=0, baseline_tokens=None)
    report = evaluate(transcoder, cache, language_model=language_model, settings=settings)
    weights = torch.from_numpy(ridge_by_hand(training_rows(cache, READS), training_rows(cache, GIVES))).float()
    means = [cache.statistics(hook).mean.float() for hook in (READS, GIVES)]
    assert transcoder.W_skip is not None
    for name, W, b in (
        ("linear", weights[:-1], weights[-1]),
        ("skip", transcoder.W_skip, means[1] - means[0] @ transcoder.W_skip),
    ):
        plain = make(cache, skip=True)
        plain.W_dec.zero_()
        assert plain.W_skip is not None
        plain.W_skip.copy_(W)
        plain.b_dec.copy_(b)
        downstream = report.baselines[name].downstream
        assert downstream is not None
        expected = spliced_loss(cache, language_model, plain)
        assert downstream.ce_spliced.value == pytest.approx(expected, rel=1e-5), name
        assert abs(expected - spliced_loss(cache, language_model, transcoder)) > 1e-3


def test_views_say_what_the_baselines_are(cache: ActivationCache) -> None:
    one, two = make(cache, skip=True), make(cache, skip=True, seed=1)
    autoencoder = TopK(32, 64, k=4, metadata={"hook": GIVES}).requires_grad_(False)
    reports = evaluate_all({"one": one, "two": two, "sae": autoencoder}, cache, settings=SETTINGS)
    assert list(reports["sae"].baselines) == ["pca", "random", "frozen_decoder", "identity"]
    assert (
        reports["one"].baselines["skip"].reconstruction.mse.value
        != reports["two"].baselines["skip"].reconstruction.mse.value
    )
    text = markdown(reports["one"], [])
    assert f"# Evaluation at `{READS} → {GIVES}`" in text
    assert "| dictionary | PCA | linear | skip | identity |" in text
    assert f"PCA and the identity read the target, not `{READS}`." in text
    assert "read the target" not in markdown(reports["sae"], [])

    def points(*names: str) -> dict[str, Point]:
        return {
            name: Point.of(
                "topk", reports[name].to_json(), hook=GIVES if name == "sae" else f"{READS} → {GIVES}",
                d_sae=64, k=4, seed=0, cost={},
            )
            for name in names
        }  # fmt: skip

    linear_and_skip = (
        "linear is the best affine map from what a transcoder reads; skip is W_skip of the dictionary alone, with the "
        "best constant; the identity has FVU 0 and ΔCE 0."
    )
    text = sweep_markdown(points("one", "two"), {}, None)
    assert "| FVU | dictionary | PCA | linear | skip |" in text
    assert f"PCA has the dictionary's size; that of a transcoder is of its target; {linear_and_skip}" in text
    text = sweep_markdown(points("one", "sae"), {}, None)
    assert "random dictionaries and frozen decoders are for the others; linear is" in text
    assert "Each has the dictionary's size; the identity has FVU 0 and ΔCE 0." in sweep_markdown(
        points("sae"), {}, None
    )

    comparison = compare({"one": one, "two": two}, cache, settings=SETTINGS)
    assert list(comparison.baselines) == ["pca", "linear", "skip, one", "skip, two", "identity"]
    assert "| PCA | linear | skip, one | skip, two | identity |" in comparison_markdown(comparison)
    assert comparison_tables(comparison)


def test_reports_are_kept_and_those_without_these_baselines_made_anew(cache: ActivationCache, tmp_path: Path) -> None:
    transcoder = make(cache, skip=True)
    report = evaluate(transcoder, cache, settings=SETTINGS)
    write_report(report, tmp_path)
    request = (identify(transcoder), cache.manifest.identity(GIVES))

    def stored() -> object:
        return read_stored(tmp_path, *request, hook=GIVES, settings=SETTINGS)

    found = stored()
    assert found is not None
    for missing in ("linear", "skip"):
        record = json.loads((tmp_path / JSON_FILE).read_bytes())
        del record["baselines"][missing]
        write_json(tmp_path / JSON_FILE, record)
        assert stored() is None, missing
        write_report(report, tmp_path)
        assert stored() is not None


def test_the_cost_counts_them(cache: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, of 2,031 tokens for dictionaries, 1,354 for baselines and 1,015 for formulas of other packages."""
    monkeypatch.setattr(cache.manifest, "rows", {"train": 1_500_000, "held_out": 60_000})
    plain, skip = make(cache), make(cache, skip=True)
    autoencoder = TopK(32, 64, k=4, metadata={"hook": GIVES})
    for dictionaries, passes in (
        ([autoencoder], 4 * 2031 + 3 * 1354 + 4 * 1015),
        ([plain], 5 * 2031 + 2 * 1354),  # read; clean, zero, mean, itself; PCA, linear
        ([skip, skip], 6 * 2031 + 4 * 1354),
        ([autoencoder, skip], 6 * 2031 + 5 * 1354 + 4 * 1015),
    ):
        assert f"about {passes:,} tokens" in announcement(EvaluationConfig(), cache, dictionaries)


def test_a_skip_connection_of_an_autoencoder_is_a_baseline_too(cache: ActivationCache) -> None:
    autoencoder = TopK(32, 64, k=4, metadata={"hook": GIVES})
    autoencoder.set_frame(Frame(skip=True))
    y, _ = eligible_rows(cache, GIVES)
    assert autoencoder.requires_grad_(False).W_skip is not None
    autoencoder.W_skip.copy_(0.5 * torch.eye(32))
    report = evaluate(autoencoder, cache, settings=SETTINGS)
    assert list(report.baselines) == ["pca", "random", "skip", "frozen_decoder", "identity"]
    expected = 0.5 * y + 0.5 * cache.statistics(GIVES).mean
    value = report.baselines["skip"].reconstruction.fvu.value
    assert value == pytest.approx(fvu(y.double().numpy(), expected.double().numpy()), rel=1e-4)
