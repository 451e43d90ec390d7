from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae.activations.loader import ActivationLoader
from sae.activations.tokens import eligible_rows
from sae.architectures import TopK
from sae.config.settings import DictionaryConfig, EvaluationConfig, TrainConfig
from sae.evaluation import Report, evaluate
from sae.evaluation.baselines import Baseline, RandomDictionary, fit_pca
from sae.evaluation.frozen_decoder import train_frozen_decoders
from sae.evaluation.held_out import HeldOut, training_blocks
from sae.evaluation.report_view import markdown
from sae.training import Outcome, train, train_all
from tests.support.evaluation_cache import Fixed, make_cache, random_rows
from tests.support.fake_cache import HOOK, POLICY

TRAIN = random_rows(700, 6, 12, seed=1)
HELD_OUT = random_rows(150, 6, 9, seed=2)


def _train_x() -> torch.Tensor:
    x, tokens, _ = TRAIN
    return x[eligible_rows(tokens, POLICY, 8)].double()


@pytest.mark.parametrize("components", [1, 3, 6, 50])
def test_pca_is_the_truncated_singular_value_decomposition(tmp_path: Path, components: int) -> None:
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    pca = fit_pca(cache, HOOK).reconstructor(components)
    x = _train_x()
    centred = x - x.mean(0)
    U, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    S[components:] = 0
    expected = U @ torch.diag(S) @ Vh + x.mean(0)
    assert torch.allclose(pca(x.float()).x_hat.double(), expected, atol=2e-5)
    codes = pca(x.float()).codes
    assert codes is not None and codes.values.shape[1] == min(components, 6) == pca.features


def test_pca_on_training_tokens_has_the_residual_variance_of_the_eigenvalues(tmp_path: Path) -> None:
    report = evaluate(TopK(6, 24, k=2).requires_grad_(False), make_cache(tmp_path, TRAIN), hook=HOOK)
    S = torch.linalg.svdvals(_train_x() - _train_x().mean(0))
    fvu = report.baselines["pca"].reconstruction.fvu.value
    assert fvu == pytest.approx(float(S[2:].square().sum() / S.square().sum()), rel=1e-5)
    assert "2 principal components" in report.baselines["pca"].description
    assert report.to_json()["baselines"]["pca"]["l0"]["value"] == 2


def test_the_gain_of_the_random_dictionary_is_least_squares(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    random = RandomDictionary(cache, HOOK, 64, {4}).reconstructor(4)
    x = _train_x()
    x_hat = random(x.float()).x_hat.double()
    b = cache.statistics(HOOK).mean.double()
    error = (x - x_hat).square().sum()
    for factor in (0.98, 1.02):
        assert (x - (b + factor * (x_hat - b))).square().sum() > error
    assert error < (x - b).square().sum()
    codes = random(x.float()).codes
    assert codes is not None and int((codes.values > 0).sum(-1).max()) <= 4
    again = RandomDictionary(cache, HOOK, 64, {2, 4, 9}).reconstructor(4)
    assert torch.equal(random(x.float()).x_hat, again(x.float()).x_hat)


def test_no_dictionary_begins_with_the_random_directions_of_a_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    drawn = {"random": RandomDictionary(cache, HOOK, 40, {2}).dictionary.W_dec}

    def watched(*given: Any, **options: Any) -> Outcome:
        outcome = train_all(*given, **options)
        drawn["frozen decoder"] = outcome.dictionaries["0"].W_dec
        return outcome

    monkeypatch.setattr("sae.evaluation.frozen_decoder.train_all", watched)
    train_frozen_decoders([Baseline("frozen_decoder", 2, 40, "topk")], HeldOut(cache, HOOK), 600)
    rows = torch.cat(list(drawn.values()))
    assert float((rows @ rows.T).fill_diagonal_(0).max()) < 0.9999, "each other's"
    for seed in range(6):
        loader = ActivationLoader(cache, HOOK, batch_size=64)
        shape, settings = DictionaryConfig(d_sae=40, k=2), TrainConfig(tokens=64, batch_size=64, lr=1e-9)
        begun = train(loader, shape, settings, seed=seed).W_dec
        assert float((begun @ rows.T).max()) < 0.9999, f"seed {seed}"


def test_baselines_get_k_or_the_mean_l0(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    report = evaluate(Fixed(6, 5, lambda x: x), cache, hook=HOOK)  # fires on every positive number
    assert report.scores.sparsity is not None
    k = round(report.scores.sparsity.l0.value or 0)
    assert f"{k} principal components" in report.baselines["pca"].description
    assert f"5 random directions, top {k}" in report.baselines["random"].description


def test_training_tokens_are_spread_over_the_cache(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    x, tokens, _ = TRAIN
    eligible = eligible_rows(tokens, POLICY, 8)
    assert torch.equal(torch.cat(list(training_blocks(cache, HOOK, 10_000))), x[eligible])
    some = torch.cat(list(training_blocks(cache, HOOK, 200)))
    fourth = torch.arange(700) // 8 % 4 == 0
    assert torch.equal(some, x[eligible & fourth])
    assert len(torch.cat(list(training_blocks(cache, HOOK, 1)))) <= 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_scores(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    dictionary = TopK(6, 24, k=2).requires_grad_(False)
    dictionary.W_enc.copy_(torch.randn(6, 24, generator=torch.Generator().manual_seed(0)))
    dictionary.W_dec.copy_(torch.nn.functional.normalize(dictionary.W_enc.T, dim=-1))
    cpu, gpu = (evaluate(dictionary, cache, hook=HOOK, device=device).columns for device in ("cpu", "cuda"))
    for name, scores in cpu.items():
        for metric in ("mse", "fvu", "cosine", "l2_ratio"):
            one, other = getattr(scores.reconstruction, metric), getattr(gpu[name].reconstruction, metric)
            assert other.value == pytest.approx(one.value, rel=1e-4, abs=1e-9), (name, metric)
    assert dictionary.W_dec.device.type == "cpu"


def test_baselines_are_reconstructed_on_every_nth_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted through the split, over the edges of blocks; on all of them the numbers are of all."""
    monkeypatch.setattr("sae.evaluation.held_out.BLOCK_TOKENS", 32)
    cache = make_cache(tmp_path, HELD_OUT, TRAIN)
    x, tokens, _ = HELD_OUT
    held_out = x[eligible_rows(tokens, POLICY, 8)]

    def measured(wanted: int | None) -> Report:
        settings = EvaluationConfig(baseline_reconstruction_tokens=wanted, frozen_decoder_tokens=0)
        return evaluate(TopK(6, 24, k=2).requires_grad_(False), cache, hook=HOOK, settings=settings)

    few, every = measured(-(-len(held_out) // 5)), measured(None)
    assert few.scores.reconstruction == every.scores.reconstruction, "the dictionary is measured on all"
    pca = fit_pca(cache, HOOK).reconstructor(2)
    for made, rows in ((few, held_out[::5]), (every, held_out)):
        scores = made.baselines["pca"]
        error = (rows - pca(rows).x_hat).double().square().sum(-1).mean()
        assert scores.reconstruction.mse.value == pytest.approx(float(error), rel=1e-5)
        assert scores.sparsity is not None and scores.sparsity.tokens == scores.tokens == len(rows)
        assert made.to_json()["baselines"]["pca"]["tokens"] == len(rows)
    assert f"Baselines are measured on less: reconstruction and sparsity on {len(held_out[::5])} tokens" in markdown(
        few, []
    )
    assert "on less" not in markdown(every, [])
