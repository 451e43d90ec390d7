"""Other packages' formulas: the numbers that the packages' own functions give on the same tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.settings import EvaluationConfig
from sae.dictionary.token_policy import TokenPolicy
from sae.evaluation import evaluate
from sae.evaluation.budget import settled
from sae.evaluation.candidate import from_object
from sae.evaluation.held_out import HeldOut
from sae.evaluation.published import PublishedScores, measure_published
from sae.evaluation.published_formulas import SAEBENCH, SAELENS
from sae.evaluation.report_view import markdown
from sae.model.language_model import LanguageModel, Replacement
from tests.support import published_case as case
from tests.support.evaluation_cache import make_cache, random_rows

REFERENCE: dict[str, dict[str, dict[str, float]]] = {
    "sae-lens 6.54.12": {
        "dictionary": {
            "l2_norm_in": 5.298901557922363,
            "l2_norm_out": 4.420621871948242,
            "l2_ratio": 0.8424360752105713,
            "relative_reconstruction_bias": 0.8933113217353821,
            "l0": 9.409523963928223,
            "l1": 8.135970115661621,
            "explained_variance_legacy": 0.552159309387207,
            "mse": 4.077733039855957,
            "cossim": 0.9346923232078552,
            "explained_variance": 0.5977276260619774,
            "kl_div_with_sae": 0.0006904934416525066,
            "kl_div_with_ablation": 0.3490810692310333,
            "ce_loss_with_sae": 3.3680877685546875,
            "ce_loss_without_sae": 3.3681037425994873,
            "ce_loss_with_ablation": 2.9957315921783447,
            "kl_div_score": 0.99802196824029,
            "ce_loss_score": 0.9999571019347667,
        },
        "mean predictor": {
            "l2_ratio": 0.8383401036262512,
            "explained_variance_legacy": -0.006155045703053474,
            "mse": 10.136747360229492,
            "cossim": 0.814494788646698,
            "explained_variance": -1.4680923166032755e-07,
        },
    },
    "sae-bench 0.6.0": {
        "dictionary": {
            "l2_norm_in": 5.298901557922363,
            "l2_norm_out": 4.420621871948242,
            "l2_ratio": 0.8424360752105713,
            "relative_reconstruction_bias": 0.8933113217353821,
            "l0": 9.409523963928223,
            "l1": 8.135970115661621,
            "explained_variance": 0.7381070852279663,
            "explained_variance_legacy": 0.552159309387207,
            "mse": 0.029679052531719208,
            "cossim": 0.9346923232078552,
            "kl_div_with_sae": 0.2274918258190155,
            "kl_div_with_ablation": 0.34908100962638855,
            "ce_loss_with_sae": 3.281167507171631,
            "ce_loss_without_sae": 3.3681037425994873,
            "ce_loss_with_ablation": 2.9957315921783447,
            "kl_div_score": 0.3483122268309768,
            "ce_loss_score": 0.7665340027992589,
        },
        "mean predictor": {
            "l2_ratio": 0.8383401036262512,
            "explained_variance": 0.35399019718170166,
            "explained_variance_legacy": -0.006155045703053474,
            "mse": 0.07320917397737503,
            "cossim": 0.814494788646698,
        },
    },
}
"""Printed by `scripts/legacy_reference.py`."""


class Toy(LanguageModel):
    """The toy model of `published_case`, as evaluation calls it."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def replaced_logits(self, tokens: Tensor, hook: str, replacements: Sequence[Replacement]) -> Iterator[Tensor]:
        for replacement in replacements:
            yield case.logits(replacement(case.residual(tokens)))


class Toys:
    """The dictionary of `published_case`."""

    def __init__(self, decode: Any = case.decode) -> None:
        self._decode = decode

    def encode(self, x: Tensor) -> Tensor:
        return case.encode(x)

    def decode(self, features: Tensor) -> Tensor:
        return self._decode(features)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    x, tokens = case.residual(case.TOKENS).flatten(0, 1), case.TOKENS.flatten()
    documents = torch.arange(len(tokens)) // 30
    return make_cache(
        tmp_path_factory.mktemp("legacy"), (x, tokens, documents), context_length=case.SEQ, shard_contexts=7,
        policy=TokenPolicy(True, 1, (case.SPECIAL,)),
    )  # fmt: skip


def _measure(cache: ActivationCache, language_model: LanguageModel | None = None, **settings: Any) -> PublishedScores:
    made = from_object(Toys(), case.D_SAE, "toy")
    asked = settled(EvaluationConfig(**settings), cache)
    return measure_published(HeldOut(cache, case.HOOK, asked, language_model), {"toy": made}, case.mean())["toy"]


@pytest.mark.parametrize("package", [SAELENS, SAEBENCH])
def test_the_packages_own_functions_give_the_same_numbers(cache: ActivationCache, package: str) -> None:
    found = _measure(cache, Toy())
    assert found.contexts == case.CONTEXTS
    assert found.tokens == int((case.TOKENS != case.SPECIAL).sum())
    expected = REFERENCE[package]["dictionary"]
    assert set(found.of[package]) == set(expected)
    for name, value in expected.items():
        assert found.of[package][name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    of_mean = REFERENCE[package]["mean predictor"]
    for name in ("explained_variance", "explained_variance_legacy", "mse", "cossim", "l2_ratio"):
        assert found.mean_predictor[package][name] == pytest.approx(of_mean[name], rel=2e-5, abs=2e-6), name


def test_only_the_right_formula_gives_a_mean_predictor_0(cache: ActivationCache) -> None:
    found = _measure(cache).mean_predictor
    assert found[SAELENS]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert found[SAEBENCH]["explained_variance"] == pytest.approx(0.35399, abs=1e-5)


def test_saebench_s_formulas_depend_on_units_and_batches(tmp_path: Path) -> None:
    """Its explained variance changes when everything is scaled, its mse with the number of tokens in a batch."""
    x, tokens, documents = random_rows(16 * 8 * 4, 6, 9)
    made = {c: make_cache(tmp_path / str(c), (c * x, tokens, documents)) for c in (1, 3)}
    half = {1: x, 3: 3 * x}
    scores = {
        c: measure_published(
            HeldOut(cache, case.HOOK, settled(EvaluationConfig(), cache)),
            {"half": from_object(Scaled(), 6, "half")}, half[c].mean(0),
        )["half"].of
        for c, cache in made.items()
    }  # fmt: skip
    ours = [scores[c][SAELENS]["explained_variance"] for c in (1, 3)]
    theirs = [scores[c][SAEBENCH]["explained_variance"] for c in (1, 3)]
    assert ours[0] == pytest.approx(ours[1], rel=1e-5)
    assert theirs[0] is not None and theirs[1] is not None
    assert abs(theirs[0] - theirs[1]) > 0.05
    mse, divided = scores[1][SAELENS]["mse"], scores[1][SAEBENCH]["mse"]
    assert mse is not None
    kept, batches = int((tokens != 0).sum()), 4
    assert divided == pytest.approx(mse * batches / kept, rel=0.05)


class Scaled:
    """x̂ = x / 2, with the positive numbers as features."""

    def encode(self, x: Tensor) -> Tensor:
        self.x = x
        return x.relu()

    def decode(self, features: Tensor) -> Tensor:
        return self.x / 2 if features.shape[0] == self.x.shape[0] else features


def test_batches_are_sixteen_contexts_however_the_cache_is_read(cache: ActivationCache) -> None:
    one, other = (_measure(cache, Toy(), batch_contexts=n) for n in (1, 9))
    assert one == other


def test_a_negative_feature_counts_in_saelens_s_l1_and_cancels_in_saebench_s(cache: ActivationCache) -> None:
    class Signed(Toys):
        def encode(self, x: Tensor) -> Tensor:
            return -super().encode(x)

        def decode(self, features: Tensor) -> Tensor:
            return case.decode(-features)

    made = from_object(Signed(), case.D_SAE, "signed")
    held_out = HeldOut(cache, case.HOOK, settled(EvaluationConfig(), cache))
    found = measure_published(held_out, {"signed": made}, case.mean())["signed"].of
    assert found[SAELENS]["l0"] == found[SAEBENCH]["l0"] == pytest.approx(REFERENCE[SAELENS]["dictionary"]["l0"])
    assert found[SAELENS]["l1"] == pytest.approx(REFERENCE[SAELENS]["dictionary"]["l1"], rel=1e-5)
    assert found[SAEBENCH]["l1"] == pytest.approx(-REFERENCE[SAEBENCH]["dictionary"]["l1"], rel=1e-5)


def test_legacy_numbers_stand_apart_and_can_be_left_out(tmp_path: Path) -> None:
    x, tokens, documents = random_rows(150, 6, 9)  # 18 contexts of 8, and a shorter one, which no package has
    cache = make_cache(tmp_path, (x, tokens, documents))
    dictionary = TopK(6, 24, k=3).requires_grad_(False)
    report = evaluate(dictionary, cache, hook=case.HOOK)
    written = report.to_json()["legacy"]
    assert written["for"] == "comparison with published numbers only"
    assert (written["contexts"], written["contexts_per_batch"]) == (18, 16)
    assert written["tokens"] == int((tokens[:144] != 0).sum())
    assert set(written["formulas"]) == {"sae-lens 6.54.12", "sae-bench 0.6.0"}
    text = markdown(report, [])
    before, heading, after = text.partition("## For comparison with published numbers only")
    assert heading and "explained_variance_legacy" in after and "explained_variance_legacy" not in before
    assert "sae-lens 6.54.12" in after and "sae-bench 0.6.0" in after
    for settings in (EvaluationConfig(legacy_tokens=0), EvaluationConfig(legacy_tokens=7)):
        without = evaluate(dictionary, cache, hook=case.HOOK, settings=settings)
        assert without.legacy is None and without.to_json()["legacy"] is None
        assert "published numbers" not in markdown(without, [])


def test_what_gives_no_number_is_null(tmp_path: Path) -> None:
    """x̂ = 0 has no direction: their cosine is not a number, which JSON cannot hold."""
    cache = make_cache(tmp_path, random_rows(150, 6, 9))
    nothing = TopK(6, 24, k=3).requires_grad_(False)
    found = evaluate(nothing, cache, hook=case.HOOK).legacy
    assert found is not None
    assert found.of[SAELENS]["cossim"] is None and found.of[SAELENS]["l2_ratio"] == 0
    assert found.of[SAEBENCH]["relative_reconstruction_bias"] is None
