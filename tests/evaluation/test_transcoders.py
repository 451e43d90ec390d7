"""A transcoder's report: its target from what it reads, against slow references and the spliced model."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sae
from sae.activations import ActivationCache
from sae.activations.loader import ActivationLoader
from sae.architectures import TopK
from sae.config.settings import DictionaryConfig, EvaluationConfig, TrainConfig
from sae.config.splits import HELD_OUT
from sae.errors import CacheError, ConfigError
from sae.evaluation import evaluate, evaluate_all
from sae.evaluation.held_out import HeldOut, held_out_blocks
from sae.evaluation.report_view import markdown
from sae.model.language_model import LanguageModel
from sae.model.splicing import splice
from tests.support import evaluation_reference as reference

READS, GIVES = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"


def make_transcoder(cache: ActivationCache, seed: int = 0) -> TopK:
    dictionary = TopK(32, 64, k=4, metadata=sae.dictionary_metadata(cache, READS, GIVES)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in dictionary.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return dictionary


def eligible_rows(cache: ActivationCache, hook: str) -> tuple[Tensor, np.ndarray]:
    """All eligible held-out activations, and the document of each."""
    rows, documents = [], []
    for batch in cache.contexts(HELD_OUT, hook, batch_contexts=1):
        assert batch.activations is not None
        rows.append(batch.activations[batch.eligible])
        documents.append(batch.documents[batch.eligible])
    return torch.cat(rows), torch.cat(documents).numpy()


@pytest.mark.parametrize("batch_contexts", [1, 7])
def test_reconstruction_is_that_of_the_target(many_documents: ActivationCache, batch_contexts: int) -> None:
    transcoder = make_transcoder(many_documents)
    (x, documents), (y, _) = (eligible_rows(many_documents, hook) for hook in (READS, GIVES))
    settings = EvaluationConfig(batch_contexts=batch_contexts)
    report = evaluate(transcoder, many_documents, hook=GIVES, settings=settings)
    expected = reference.reconstruction(y.numpy(), transcoder(x).numpy(), documents)
    for name, (value, error) in expected.items():
        estimate = getattr(report.scores.reconstruction, name)
        assert estimate.value == pytest.approx(value, rel=1e-4), name
        assert estimate.standard_error == pytest.approx(error, rel=1e-3), name
    assert report.scores.sparsity is not None
    assert report.scores.sparsity.l0.value == pytest.approx(float((transcoder.encode(x) > 0).sum(1).double().mean()))
    assert report.baselines["identity"].reconstruction.fvu.value == 0
    assert report.to_json()["dictionary"]["reads"] == READS and report.hook == GIVES
    assert report.scores.description.endswith(f", from {READS}")


def test_a_constant_scores_one(many_documents: ActivationCache) -> None:
    """Whatever it reads: the mean of the target has FVU 1, and the target's own values have 0."""
    transcoder = make_transcoder(many_documents)
    y, _ = eligible_rows(many_documents, GIVES)
    transcoder.W_dec.zero_()
    transcoder.b_dec.copy_(y.double().mean(0))
    assert evaluate(transcoder, many_documents, hook=GIVES).scores.reconstruction.fvu.value == pytest.approx(
        1, abs=1e-5
    )


def test_losses_are_those_of_the_spliced_model(many_documents: ActivationCache, language_model: LanguageModel) -> None:
    transcoder = make_transcoder(many_documents)
    plain = TopK(32, 64, k=4).requires_grad_(False)
    plain.load_state_dict(transcoder.state_dict())
    reports = evaluate_all(
        {"transcoder": transcoder, "plain": plain}, many_documents, hook=GIVES, language_model=language_model
    )
    plain.metadata = {"tokens": many_documents.policy.to_json()}
    mean = {
        "clean": spliced_loss(many_documents, language_model, None),
        "transcoder": spliced_loss(many_documents, language_model, transcoder),
        "plain": spliced_loss(many_documents, language_model, plain, hook=GIVES),
    }
    for name, report in reports.items():
        assert report.scores.downstream is not None
        assert report.scores.downstream.ce_clean.value == pytest.approx(mean["clean"], rel=1e-5)
        assert report.scores.downstream.ce_spliced.value == pytest.approx(mean[name], rel=1e-5), name
    for other in ("plain", "clean"):
        assert abs(mean["transcoder"] - mean[other]) > 1e-3, "above ten times what is tolerated"


def spliced_loss(
    cache: ActivationCache, model: LanguageModel, dictionary: TopK | None, hook: str | None = None
) -> float:
    """Mean next-token loss over the positions that count, with a dictionary spliced in, one context at a time."""
    losses = []
    for batch in cache.contexts(HELD_OUT, batch_contexts=1):
        with splice(model, dictionary, hook=hook) if dictionary is not None else contextlib.nullcontext():
            log_p = model.logits(batch.tokens)[0, :-1].log_softmax(-1)
        losses.append(-log_p[torch.arange(len(log_p)), batch.tokens[0, 1:]][batch.eligible[0, :-1]])
    return float(torch.cat(losses).double().mean())


def test_from_training_to_a_report(many_documents: ActivationCache, tmp_path: Path) -> None:
    """Trained on both hook points of the cache, saved and loaded: better than the mean and than what is untrained."""
    loaders = [
        ActivationLoader(many_documents, hook, batch_size=64, seed=0, pool_tokens=512) for hook in (READS, GIVES)
    ]
    sae.train(
        loaders[0], DictionaryConfig(d_sae=64, k=8), TrainConfig(tokens=20_000, center=True), target=loaders[1],
        metadata=sae.dictionary_metadata(many_documents, READS, GIVES),
    ).save(tmp_path)  # fmt: skip
    loaded = sae.load(tmp_path)
    assert (loaded.origin.reads.hook, loaded.origin.gives.hook) == (READS, GIVES)
    trained = evaluate(loaded, many_documents, hook=GIVES).scores.reconstruction.fvu.value
    untrained = evaluate(make_transcoder(many_documents), many_documents, hook=GIVES).scores.reconstruction.fvu.value
    assert trained is not None and untrained is not None
    assert trained < 0.2
    assert untrained > 1
    compared = sae.compare({"t": loaded, "u": make_transcoder(many_documents)}, many_documents)
    assert compared.dictionaries["u"].differences["fvu"].value == pytest.approx(untrained - trained, rel=1e-5)


def test_formulas_of_other_packages_are_left_out_with_a_word(many_documents: ActivationCache) -> None:
    plain = TopK(32, 64, k=4, metadata={"hook": GIVES}).requires_grad_(False)
    reports = evaluate_all({"t": make_transcoder(many_documents), "p": plain}, many_documents, hook=GIVES)
    assert reports["t"].legacy is None and reports["p"].legacy is not None
    words = "Nothing: the formulas of other packages are for dictionaries that give what they read."
    assert words in markdown(reports["t"], []) and words not in markdown(reports["p"], [])


def test_the_hook_point_is_the_one_that_dictionaries_give(many_documents: ActivationCache) -> None:
    transcoder, bare = make_transcoder(many_documents), TopK(32, 64, k=4).requires_grad_(False)
    settings = EvaluationConfig(tokens=64, frozen_decoder_tokens=0)
    for dictionaries in ({"t": transcoder}, {"t": transcoder, "bare": bare}):
        assert {one.hook for one in evaluate_all(dictionaries, many_documents, settings=settings).values()} == {GIVES}
    with pytest.raises(ConfigError, match=f"nothing says which hook point it is: the cache has '{READS}', '{GIVES}'"):
        evaluate(bare, many_documents)
    other = TopK(32, 64, k=4, metadata={"hook": READS}).requires_grad_(False)
    with pytest.raises(ConfigError, match=f"are of the hook points '{READS}', '{GIVES}'; give hook="):
        evaluate_all({"t": transcoder, "o": other}, many_documents)


def test_rows_of_other_hook_points_belong_to_the_same_tokens(many_documents: ActivationCache) -> None:
    for batch_contexts in (1, 5):
        settings = EvaluationConfig(batch_contexts=batch_contexts)
        blocks = list(held_out_blocks(HeldOut(many_documents, GIVES, settings), [READS]))
        assert torch.equal(
            torch.cat([block.others[READS] for block in blocks]), eligible_rows(many_documents, READS)[0]
        )
        assert torch.equal(torch.cat([block.x for block in blocks]), eligible_rows(many_documents, GIVES)[0])


def test_refusals(many_documents: ActivationCache) -> None:
    transcoder = make_transcoder(many_documents)
    with pytest.raises(
        ConfigError, match=f"hook '{READS}': the dictionary gives activations of '{GIVES}'; use it there"
    ):
        evaluate(transcoder, many_documents, hook=READS)
    transcoder.metadata["hook"] = "blocks.0.hook_mlp_out"
    with pytest.raises(CacheError, match=r"hook 'blocks\.0\.hook_mlp_out' is not in it; it holds"):
        evaluate(transcoder, many_documents, hook=GIVES)
    transcoder.metadata |= {"hook": GIVES, "target_hook": READS}
    with pytest.raises(ConfigError, match=f"target hook '{READS}' comes before '{GIVES}'"):
        evaluate(transcoder, many_documents, hook=READS)
    with pytest.raises(ConfigError, match="comes before"):
        sae.dictionary_metadata(many_documents, GIVES, READS)
    with pytest.raises(CacheError, match="is not in it"):
        sae.dictionary_metadata(many_documents, READS, "blocks.2.hook_resid_post")
    entry = many_documents.manifest.hooks[GIVES]
    many_documents.manifest.hooks[GIVES] = entry.model_copy(update={"d_in": 16})
    try:
        with pytest.raises(ConfigError, match="activations have 16 numbers, the dictionary gives 32"):
            evaluate(make_transcoder_of(many_documents), many_documents, hook=GIVES)
    finally:
        many_documents.manifest.hooks[GIVES] = entry


def make_transcoder_of(cache: ActivationCache) -> TopK:
    return TopK(32, 64, k=4, metadata={"hook": READS, "target_hook": GIVES}).requires_grad_(False)
