from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.settings import EvaluationConfig
from sae.config.sources import ModelConfig
from sae.config.splits import HELD_OUT
from sae.errors import CacheError, ConfigError
from sae.evaluation import evaluate, write_report
from sae.evaluation.metrics import METRICS
from sae.evaluation.report import Report
from sae.evaluation.report_view import markdown, report_table
from sae.model.language_model import LanguageModel
from sae.runs.pipeline import run
from tests.support import evaluation_reference as reference
from tests.support.evaluation_cache import Fixed

HOOK = "blocks.1.hook_resid_pre"


def _evaluate(
    cache: ActivationCache, language_model: LanguageModel, reconstruct: Any, **settings: Any
) -> dict[str, Any]:
    dictionary = Fixed(32, 8, reconstruct)
    return evaluate(
        dictionary, cache, hook=HOOK, language_model=language_model, settings=EvaluationConfig(**settings)
    ).to_json()


def _direct(cache: ActivationCache, language_model: LanguageModel, new: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, log-probabilities, documents of the counted positions; x: by a plain hook on the Hugging Face model."""
    model = language_model.bridge.original_model
    losses, log_probabilities, documents, activations = [], [], [], []
    for batch in cache.contexts(HELD_OUT, batch_contexts=1):

        def replace(module: Any, arguments: Any, eligible: Tensor = batch.eligible) -> Any:
            x = arguments[0].clone()
            activations.append(x[eligible])
            x[eligible] = new(x[eligible]).to(x)
            return (x, *arguments[1:])

        handle = model.transformer.h[1].register_forward_pre_hook(replace)
        with torch.no_grad():
            log_p = model(batch.tokens).logits[0, :-1].log_softmax(-1)
        handle.remove()
        counted = batch.eligible[0, :-1]
        losses.append(-log_p[torch.arange(len(counted)), batch.tokens[0, 1:]][counted])
        log_probabilities.append(log_p[counted])
        documents.append(batch.documents[0, :-1][counted])
    return (
        torch.cat(losses).double(),
        torch.cat(log_probabilities).double(),
        torch.cat(documents),
        torch.cat(activations),
    )


def test_identity_loses_nothing(many_documents: ActivationCache, language_model: LanguageModel) -> None:
    scores = _evaluate(many_documents, language_model, lambda x: x)
    assert scores["ce_spliced"] == scores["ce_clean"]
    assert (scores["delta_ce"]["value"], scores["delta_ce"]["standard_error"]) == (0, 0)
    assert (scores["kl"]["value"], scores["kl"]["standard_error"]) == (0, 0)
    assert scores["ce_recovered_zero"]["value"] == scores["ce_recovered_mean"]["value"] == 1
    for name in ("ce_clean", "ce_spliced", "delta_ce", "ce_recovered_zero", "ce_recovered_mean", "kl"):
        assert scores["baselines"]["identity"][name] == scores[name], name


def test_losses_equal_plain_hooks_on_the_hugging_face_model(
    many_documents: ActivationCache, language_model: LanguageModel
) -> None:
    def reconstruct(x: Tensor) -> Tensor:
        return 0.5 * x + 0.1

    scores = _evaluate(many_documents, language_model, reconstruct)
    clean, log_p, documents, x = _direct(many_documents, language_model, lambda x: x)
    zero, *_ = _direct(many_documents, language_model, torch.zeros_like)
    mean, *_ = _direct(many_documents, language_model, lambda part: x.double().mean(0).expand_as(part))
    spliced, log_q, *_ = _direct(many_documents, language_model, reconstruct)
    one, origin = torch.ones_like(clean), documents.numpy()
    expected = {
        "ce_clean": (clean, one),
        "ce_zero": (zero, one),
        "ce_mean": (mean, one),
        "ce_spliced": (spliced, one),
        "delta_ce": (spliced - clean, one),
        "ce_recovered_zero": (zero - spliced, zero - clean),
        "ce_recovered_mean": (mean - spliced, mean - clean),
        "kl": ((log_p.exp() * (log_p - log_q)).sum(-1), one),
    }
    assert float((zero - clean).abs().mean()) > 0.05, "the test's model must mind"
    for name, (a, b) in expected.items():
        value, error = reference.ratio(a.numpy(), b.numpy(), origin)
        tolerance = 1e-2 if "recovered" in name else 1e-4  # these divide by a small difference of float32 losses
        assert scores[name]["value"] == pytest.approx(value, rel=tolerance, abs=1e-6), name
        assert scores[name]["standard_error"] == pytest.approx(error, rel=10 * tolerance, abs=1e-6), name
    assert scores["evaluated"]["downstream_tokens"] == len(clean)
    assert scores["evaluated"]["downstream_documents"] == len(set(origin.tolist()))


def test_mean_and_zero_reconstructions_are_the_ablations(
    many_documents: ActivationCache, language_model: LanguageModel
) -> None:
    scores = _evaluate(many_documents, language_model, torch.zeros_like)
    assert scores["ce_spliced"] == scores["ce_zero"]
    assert scores["ce_recovered_zero"]["value"] == 0
    assert scores["baselines"]["pca"]["ce_zero"] == scores["ce_zero"]
    assert scores["baselines"]["pca"]["ce_spliced"] != scores["ce_spliced"]


def test_an_all_dead_dictionary_has_defined_numbers_everywhere(
    many_documents: ActivationCache, language_model: LanguageModel, tmp_path: Path
) -> None:
    """x̂ = b_dec = x̄ on every token: FVU 1, the loss of the mean, no feature, and no number that is none."""
    dictionary = TopK(32, 48, k=3).requires_grad_(False)
    dictionary.b_enc.fill_(-1)
    x = torch.cat([
        batch.activations[batch.eligible] for batch in many_documents.contexts(HELD_OUT, HOOK)
        if batch.activations is not None
    ])  # fmt: skip
    dictionary.b_dec.copy_(x.double().mean(0))
    report = evaluate(dictionary, many_documents, hook=HOOK, language_model=language_model)
    write_report(report, tmp_path)
    text = (tmp_path / "eval.md").read_text()
    scores = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert scores["fvu"]["value"] == pytest.approx(1, abs=1e-6)
    assert scores["ce_spliced"]["value"] == pytest.approx(scores["ce_mean"]["value"], abs=1e-5)
    assert scores["ce_recovered_mean"]["value"] == pytest.approx(0, abs=1e-4)
    assert (scores["l0"]["value"], scores["l1"]["value"], scores["dead"]["share"]) == (0, 0, 1)
    assert all(scores[name]["value"] is not None and scores[name]["standard_error"] is not None for name in METRICS)
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_paired_error_is_far_below_that_of_either_loss(
    many_documents: ActivationCache, language_model: LanguageModel
) -> None:
    scores = _evaluate(many_documents, language_model, lambda x: 0.99 * x)
    assert 0 < scores["delta_ce"]["standard_error"] < scores["ce_clean"]["standard_error"] / 5


def test_batch_size_and_other_hook_points(many_documents: ActivationCache, language_model: LanguageModel) -> None:
    hook = "blocks.2.hook_mlp_out"
    results = []
    for batch_contexts in (2, 5):
        settings = EvaluationConfig(batch_contexts=batch_contexts)
        dictionary = Fixed(32, 8, lambda x: 0.5 * x)
        results.append(
            evaluate(dictionary, many_documents, hook=hook, language_model=language_model, settings=settings)
        )
    names = ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl")
    first = results[0].to_json()
    for other in results[1:]:
        for name in names:
            assert other.to_json()[name]["value"] == pytest.approx(first[name]["value"], rel=1e-5, abs=1e-7), name


def test_downstream_tokens_limit(many_documents: ActivationCache, language_model: LanguageModel) -> None:
    scores = _evaluate(many_documents, language_model, lambda x: x, downstream_tokens=40)
    assert scores["evaluated"]["tokens"] > scores["evaluated"]["downstream_tokens"]
    assert 0 < scores["evaluated"]["downstream_tokens"] <= 2 * 14
    with pytest.raises(ConfigError, match=r"evaluation\.downstream_tokens=3: .* raise it to a context \(16\) or more"):
        _evaluate(many_documents, language_model, lambda x: x, downstream_tokens=3)


@pytest.mark.parametrize("batch_contexts", [pytest.param(1, marks=pytest.mark.slow), 4, 100])
def test_baselines_are_put_into_the_first_contexts_only(
    many_documents: ActivationCache, language_model: LanguageModel, batch_contexts: int
) -> None:
    """33 tokens take three contexts of 16: what is said of baselines is what an evaluation of just those says."""
    settings = {"batch_contexts": batch_contexts}
    whole = _evaluate(many_documents, language_model, lambda x: 0.5 * x, baseline_tokens=33, **settings)
    every = _evaluate(many_documents, language_model, lambda x: 0.5 * x, baseline_tokens=None, **settings)
    three = _evaluate(many_documents, language_model, lambda x: 0.5 * x, downstream_tokens=48, **settings)
    for column in ("pca", "random"):
        fewer, few = whole["baselines"][column], three["baselines"][column]
        assert fewer["downstream_tokens"] == few["downstream_tokens"] == three["evaluated"]["downstream_tokens"]
        assert fewer["downstream_documents"] == few["downstream_documents"]
        for name in ("ce_clean", "ce_spliced", "ce_zero", "delta_ce", "kl"):
            assert fewer[name]["value"] == pytest.approx(few[name]["value"], rel=1e-5, abs=1e-7), name
        assert fewer["ce_spliced"]["value"] != pytest.approx(
            every["baselines"][column]["ce_spliced"]["value"], rel=1e-4
        )
        assert fewer["fvu"] == every["baselines"][column]["fvu"], "only the model's passes are fewer"
    assert whole["baselines"]["identity"]["downstream_tokens"] == whole["evaluated"]["downstream_tokens"]
    for name in ("ce_clean", "ce_spliced", "delta_ce", "kl"):
        assert whole[name]["value"] == pytest.approx(every[name]["value"], rel=1e-5), (
            "the dictionary's are of all tokens"
        )


def test_tables_say_where_baselines_have_fewer_tokens(
    many_documents: ActivationCache, language_model: LanguageModel
) -> None:
    def report(baseline_tokens: int | None) -> Report:
        return evaluate(
            Fixed(32, 8, lambda x: 0.5 * x), many_documents, hook=HOOK, language_model=language_model,
            settings=EvaluationConfig(baseline_tokens=baseline_tokens),
        )  # fmt: skip

    def printed(made: Report) -> str:
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(report_table(made))
        return console.export_text()

    few, every = report(33), report(None)
    positions = few.baselines["pca"].downstream.tokens
    assert (
        f"Baselines are measured on less: losses, and the clean loss next to them, on {positions} positions."
        in markdown(few, [])
    )
    assert f"next to them, on {positions} positions" in printed(few)
    assert "on less" not in markdown(every, []) and "positions" not in printed(every)


def test_another_model_is_an_error(many_documents: ActivationCache, tiny_model: Path) -> None:
    folded = LanguageModel(ModelConfig(name=str(tiny_model), weight_processing="fold_ln"))
    with pytest.raises(CacheError, match="weight_processing"):
        _evaluate(many_documents, folded, lambda x: x)


def test_a_hook_point_that_can_be_read_only_is_evaluated_without_losses(tiny_config: Any) -> None:
    """From the harvest to the features; the report says why."""
    config = tiny_config(
        harvest__hooks=["blocks.1.hook_resid_mid"], evaluation__tokens=64, evaluation__frozen_decoder_tokens=0
    )
    done = run(config)
    assert done.is_evaluated() and len(done.features()) > 0
    record = json.loads((done.folder / "eval.json").read_text())
    assert record["road"]["name"] == "none" and not record["ce_spliced"]
    reason = "osses of the language model are left out (hook 'blocks.1.hook_resid_mid': transformer-lens can read"
    assert f"\n\nL{reason}" in (done.folder / "eval.md").read_text()
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(report_table(record))
    assert f"l{reason}" in console.export_text()
