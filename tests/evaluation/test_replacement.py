"""Modules replaced by transcoders, against plain transformers with forward hooks; what is proved, kept and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.architectures import TopK
from sae.config.settings import EvaluationConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.errors import CacheError, ConfigError, ModelError
from sae.evaluation import read_replacement, replacement_tables, write_replacement
from sae.evaluation.replacement import REPLACEMENT, ReplacementReport, replacement_cost
from sae.evaluation.replacement_view import replacement_markdown
from sae.evaluation.stand_ins import KINDS, fit_bytes, fit_stand_ins, groups_to_fit, modules_of, together
from sae.model.language_model import LanguageModel
from sae.model.splicing import splice
from tests.conftest import make_tiny_config, write_tiny_model
from tests.support.effect_case import make_gemma, make_llama
from tests.support.replacement_case import SITES, Plain, make_transcoder

MAKE: dict[str, Callable[[Path, Path], LanguageModel]] = {"llama": make_llama, "gemma": make_gemma}
EVERYTHING = EvaluationConfig(downstream_tokens=None, batch_contexts=3)


class Case:
    """A model with transcoders of three layers, and a cache of many short documents at one of its hook points."""

    def __init__(self, model: LanguageModel, folder: Path, cache: ActivationCache) -> None:
        self.model, self.folder, self.cache = model, folder, cache
        activations = model.activations(model.probe_tokens(1, 2), [hook for pair in SITES for hook in pair])
        self.dictionaries = {
            gives: make_transcoder(
                cache, reads, gives, (activations[reads].shape[-1], activations[gives].shape[-1]), seed=seed
            )
            for seed, (reads, gives) in enumerate(SITES)
        }

    def measure(self, dictionaries: dict[str, Dictionary] | None = None, **options: Any) -> ReplacementReport:
        options = {"settings": EVERYTHING, **options}
        return sae.measure_replacement(dictionaries or self.dictionaries, self.cache, self.model, **options)


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma"])
def case(
    request: pytest.FixtureRequest, tiny_model: Path, many_documents: ActivationCache, language_model: LanguageModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:  # fmt: skip
    if request.param == "gpt2":
        return Case(language_model, tiny_model, many_documents)
    folder = tmp_path_factory.mktemp(request.param)
    model = MAKE[request.param](folder / "model", tiny_model)
    numbers = {"data.held_out_tokens": 246, "harvest.hooks": ["blocks.1.hook_resid_pre"]}
    text = many_documents.path.parents[1] / "text"
    return Case(model, folder / "model", harvest(make_tiny_config(folder / "model", text, folder, numbers), model))


@pytest.fixture(scope="module")
def gpt2(tiny_model: Path, many_documents: ActivationCache, language_model: LanguageModel) -> Case:
    return Case(language_model, tiny_model, many_documents)


def test_losses_are_those_of_plain_transformers(case: Case) -> None:
    report, plain = case.measure(), Plain(case.folder, case.cache)
    functions = plain.stand_ins(case.dictionaries, SITES)
    assert list(report.together) == list(KINDS)
    for kind, losses in report.together.items():
        expected = plain.losses(SITES, functions[kind])
        assert losses.ce.value == pytest.approx(expected["ce"], abs=1e-5), kind
        assert losses.kl.value == pytest.approx(expected["kl"], abs=1e-5), kind
        assert losses.delta_ce.value == pytest.approx(expected["ce"] - expected["ce_clean"], abs=1e-5), kind
        assert report.ce_clean.value == pytest.approx(expected["ce_clean"], abs=1e-5)
    assert [(module.reads, module.gives) for module in report.modules] == SITES
    for module in report.modules:
        for kind in KINDS:
            expected = plain.losses([(module.reads, module.gives)], functions[kind])
            assert module.losses[kind].ce.value == pytest.approx(expected["ce"], abs=1e-5), (module.gives, kind)
            assert module.losses[kind].kl.value == pytest.approx(expected["kl"], abs=1e-5), (module.gives, kind)
    kls = [losses.kl.value for losses in report.together.values()]
    assert len({round(kl or 0, 4) for kl in kls}) == 5, "above what is tolerated, all differ"
    assert report.tokens == sum(int(eligible[:, :-1].sum()) for _, _, eligible in plain.contexts)
    fitted = sum(int(eligible.sum()) for _, _, eligible in plain.training)
    assert report.fitted_tokens == fitted < sum(eligible.numel() for _, _, eligible in plain.training)


def test_inside_mlps_affine_maps_are_the_model_itself(case: Case) -> None:
    """What an MLP gives is affine in what is inside it (in Gemma 2 a norm follows): no loss, alone and together."""
    pairs = [(f"blocks.{block}.mlp.hook_post", f"blocks.{block}.hook_mlp_out") for block in range(3)]
    activations = case.model.activations(case.model.probe_tokens(1, 2), [hook for pair in pairs for hook in pair])
    widths = {hook: x.shape[-1] for hook, x in activations.items()}
    dictionaries = {
        gives: make_transcoder(case.cache, reads, gives, (widths[reads], widths[gives])) for reads, gives in pairs
    }
    report = case.measure(dictionaries)
    exact = not hasattr(case.model.hf_model.config, "final_logit_softcapping")
    linear = report.together["linear"].kl.value
    assert linear is not None
    assert linear < 1e-6 if exact else linear > 1e-6
    mean = report.together["mean"].kl.value
    assert mean is not None and mean > 5e-5
    for losses in [report.together, *(module.losses for module in report.modules)]:
        assert losses["mean"].ce_recovered.value == pytest.approx(0, abs=1e-9)
        if exact:
            assert losses["linear"].ce_recovered.value == pytest.approx(1, abs=1e-3)


def test_own_activations_put_back_together_give_the_own_logits(case: Case) -> None:
    modules = modules_of(case.dictionaries, case.model)
    stand_ins = fit_stand_ins(modules, case.cache, case.model, torch.device("cpu"), lambda *_: None)
    tokens = case.model.probe_tokens(3, 14)
    own, everywhere = case.model.logits(tokens), torch.ones_like(tokens, dtype=torch.bool)
    with together(case.model, stand_ins, None, everywhere):
        assert torch.equal(case.model.logits(tokens), own)
    for kind in KINDS:
        with together(case.model, stand_ins, kind, torch.zeros_like(everywhere)):
            assert torch.equal(case.model.logits(tokens), own), "nothing is eligible"
        with together(case.model, stand_ins, kind, everywhere):
            assert not torch.allclose(case.model.logits(tokens), own, atol=1e-3), kind
    assert torch.equal(case.model.logits(tokens), own)


def test_together_they_are_as_spliced(gpt2: Case) -> None:
    """`splice` masks by the dictionaries' own records, which are the cache's."""
    report, losses = gpt2.measure(), []
    for batch in gpt2.cache.contexts("held_out", batch_contexts=1):
        with torch.no_grad(), splice(gpt2.model, list(gpt2.dictionaries.values())):
            log_p = gpt2.model.logits(batch.tokens)[0, :-1].log_softmax(-1)
        losses.append(-log_p[torch.arange(len(log_p)), batch.tokens[0, 1:]][batch.eligible[0, :-1]])
    assert report.together["dictionary"].ce.value == pytest.approx(float(torch.cat(losses).double().mean()), rel=1e-6)


def test_order_batches_and_neighbours_do_not_matter(gpt2: Case) -> None:
    report = gpt2.measure()
    turned = dict(reversed(gpt2.dictionaries.items()))
    other = gpt2.measure(turned, settings=EVERYTHING.model_copy(update={"batch_contexts": 7}))
    assert [module.gives for module in other.modules] == [gives for _, gives in SITES]
    for kind in KINDS:
        assert other.together[kind].kl.value == pytest.approx(report.together[kind].kl.value, rel=1e-5)
        assert other.together[kind].ce.standard_error == pytest.approx(report.together[kind].ce.standard_error)
    two = gpt2.measure({gives: gpt2.dictionaries[gives] for _, gives in SITES[1:]})
    for first, second in zip(two.modules, report.modules[1:], strict=True):
        assert first.losses["dictionary"].kl.value == pytest.approx(second.losses["dictionary"].kl.value, rel=1e-5)
    reads, gives = SITES[0]
    one = gpt2.measure({"one": gpt2.dictionaries[gives]})
    assert not one.modules[0].losses and one.modules[0].transcoder == "one"
    alone = report.modules[0].losses["dictionary"]
    assert one.together["dictionary"].ce.value == pytest.approx(alone.ce.value, rel=1e-5)
    assert f"## {reads} → {gives} replaced" in replacement_markdown(one)


def test_standard_errors_are_over_documents(gpt2: Case) -> None:
    """The jackknife by hand, from losses of plain transformers."""
    plain = Plain(gpt2.folder, gpt2.cache)
    functions = plain.stand_ins(gpt2.dictionaries, SITES)["dictionary"]
    sums: dict[int, list[float]] = {}
    for tokens, documents, eligible in plain.contexts:
        log_p = plain.log_p(tokens, SITES, functions, eligible)
        for context, place in eligible[:, :-1].nonzero().tolist():
            entry = sums.setdefault(int(documents[context, place]), [0.0, 0.0])
            entry[0] -= float(log_p[context, place, tokens[context, place + 1]])
            entry[1] += 1
    values = [
        sum(a for d, (a, _) in sums.items() if d != out) / sum(b for d, (_, b) in sums.items() if d != out)
        for out in sums
    ]
    n, mean = len(values), sum(values) / len(values)
    whole = sum(a for a, _ in sums.values()) / sum(b for _, b in sums.values())
    expected = ((n - 1) / n * sum((value - whole) ** 2 for value in values)) ** 0.5
    found = gpt2.measure().together["dictionary"].ce
    assert found.standard_error == pytest.approx(expected, rel=1e-3)
    assert abs(mean - whole) < 0.1


def test_skips_alone_only_if_there_are_some(gpt2: Case) -> None:
    (reads, gives), *_ = SITES
    without = make_transcoder(gpt2.cache, reads, gives, (32, 32), skip=False)
    report = gpt2.measure({**gpt2.dictionaries, gives: without})
    assert list(report.together) == ["dictionary", "linear", "mean", "zero"]
    assert [list(module.losses) == list(KINDS) for module in report.modules] == [False, True, True]
    assert "Only some of the transcoders have a skip connection." in replacement_markdown(report)


def test_the_view_and_the_files(gpt2: Case, tmp_path: Path) -> None:
    report = gpt2.measure()
    text = replacement_markdown(report)
    assert text.startswith("# 3 modules replaced of `")
    for line in (
        "## All modules replaced together",
        "| replaced by | loss | Δ loss | KL | recovered |",
        f"| nothing | {report.ce_clean} | – | – | – |",
        "## One module replaced at a time",
        f"- {SITES[0][1]}: `{SITES[0][0]}` → `{SITES[0][1]}`",
    ):
        assert line in text.replace("\\_", "_"), line
    for width in (60, 100, 200):
        assert len(replacement_tables(report, width)) == 2
    write_replacement(report, tmp_path)
    assert json.loads((tmp_path / REPLACEMENT.index).read_bytes())["format"] == "sae-replacement"
    again = read_replacement(tmp_path, report.key)
    assert again is not None and again.to_json() == report.to_json()
    assert again.modules == report.modules and again.together == report.together
    assert read_replacement(tmp_path, {**report.key, "rows": {}}) is None
    assert read_replacement(tmp_path / "elsewhere") is None


class StoppedError(Exception):
    pass


def test_an_interrupted_measurement_continues_with_the_same_numbers(
    gpt2: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.evaluation.partial.EVERY", 0.0)
    seen: list[int] = []

    def stopping(stage: str, done: int, total: int) -> None:
        if stage == "language model":
            seen.append(done)
            if done > total // 2:
                raise StoppedError

    with pytest.raises(StoppedError):
        gpt2.measure(unfinished=tmp_path, progress=stopping)
    stopped = seen[-1]
    seen.clear()
    resumed = gpt2.measure(unfinished=tmp_path, progress=lambda stage, done, total: seen.append(done))
    assert stopped in seen
    whole = gpt2.measure()
    assert resumed.together == whole.together and resumed.modules == whole.modules


def test_the_cost_is_said_before(gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: clean and proof, 5 kinds together; for each of 3 modules clean and 5 kinds; and the fit."""
    monkeypatch.setattr(gpt2.cache.manifest, "rows", {"train": 1_500_000, "held_out": 60_000})
    modules, tokens, fitted = list(gpt2.dictionaries.values()), 2031 // 16 * 16, 48_750
    passes = (2 + 5 + 3 * (1 + 5)) * tokens + fitted
    assert replacement_cost(modules, gpt2.cache, EvaluationConfig()) == (
        f"replacement of 3 modules: {tokens:,} held-out tokens for losses, 48,750 training tokens for affine maps: "
        f"language-model passes over at most {passes:,} tokens; sums of the maps take 0.0 GB"
    )


def test_affine_maps_are_fitted_in_groups_that_fit_into_memory(gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that read the same share sums; in small groups, each with a pass of its own, results are the same."""
    (reads, _), *_ = SITES
    pairs = [*SITES, (reads, "blocks.0.hook_resid_post")]
    widths = {reads: 32, SITES[1][0]: 128, SITES[2][0]: 32}
    dictionaries = {gives: make_transcoder(gpt2.cache, first, gives, (widths[first], 32)) for first, gives in pairs}
    modules, cpu = modules_of(dictionaries, gpt2.model), torch.device("cpu")
    assert [{name: len(same) for name, same in group.items()} for group in groups_to_fit(modules, cpu)] == [
        {reads: 2, SITES[1][0]: 1, SITES[2][0]: 1}
    ]
    whole = fit_stand_ins(modules, gpt2.cache, gpt2.model, cpu, lambda *_: None)
    # by hand, in float64: two sums of x x and x y for each hook point, and solving for the widest
    alone = 8 * (2 * 128 * (128 + 32) + 128 * (4 * 128 + 3 * 32))
    assert fit_bytes({SITES[1][0]: [modules[2]]}) == alone and modules[2].reads == SITES[1][0]
    monkeypatch.setattr("sae.evaluation.stand_ins.memory_of", lambda _: alone)
    assert len(groups_to_fit(modules, cpu)) > 1
    seen: list[tuple[int, int]] = []
    parts = fit_stand_ins(modules, gpt2.cache, gpt2.model, cpu, lambda _, done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    for one, other in zip(whole, parts, strict=True):
        rows = x[:, : one.module.dictionary.d_in]
        assert one.module is other.module
        torch.testing.assert_close(one("linear", rows), other("linear", rows), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("sae.evaluation.stand_ins.memory_of", lambda _: alone - 1)
    with pytest.raises(
        ConfigError, match=r"their sums take .* GB, but the device has .*; use a machine with more memory"
    ):
        fit_stand_ins(modules, gpt2.cache, gpt2.model, cpu, lambda *_: None)


def test_refused_transcoders(gpt2: Case, tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    (reads, gives), *_ = SITES

    def refusal(error: type[Exception], **dictionaries: Dictionary) -> str:
        with pytest.raises(error) as caught:
            gpt2.measure({**gpt2.dictionaries, **dictionaries})
        message = str(caught.value)
        assert "\n" not in message
        return message

    def make(**metadata: Any) -> Dictionary:
        dictionary = make_transcoder(gpt2.cache, reads, gives, (32, 32))
        dictionary.metadata |= metadata
        return dictionary

    assert refusal(ConfigError, second=make()) == (
        f"{gives} and second both give '{gives}': only one can take its place; name one transcoder for each module"
    )
    autoencoder = TopK(32, 64, k=4, metadata={"hook": "blocks.0.hook_resid_pre"})
    assert refusal(ConfigError, plain=autoencoder) == (
        "plain: reads and gives 'blocks.0.hook_resid_pre', so it is an autoencoder, which replaces no module; leave it "
        "out (sae eval measures it)"
    )
    assert refusal(ConfigError, none=TopK(32, 64, k=4)).startswith("none: does not record which hook points")
    swapped = make(hook=gives, target_hook="blocks.0.hook_resid_pre")
    assert refusal(ConfigError, swapped=swapped).startswith(
        f"swapped: target hook 'blocks.0.hook_resid_pre' comes before '{gives}', which the transcoder reads"
    )
    beyond = make(target_hook="blocks.7.hook_mlp_out")
    assert refusal(ModelError, beyond=beyond).endswith("has blocks 0 to 2")
    narrow = make_transcoder(gpt2.cache, reads, "blocks.0.hook_attn_out", (32, 16))
    narrow.metadata["hook"] = "blocks.0.hook_resid_pre"
    assert "narrow: hook 'blocks.0.hook_attn_out': activations have 32 numbers, the dictionary gives 16" in refusal(
        ConfigError, narrow=narrow
    )
    other = write_tiny_model(tmp_path / "other", text_folder, seed=1)
    stranger = make(model=LanguageModel(str(other)).info.to_json(), target_hook="blocks.2.hook_attn_out")
    message = refusal(ModelError, stranger=stranger)
    assert re.match(r"stranger: model .*: not the dictionary's model: weights_sha256 is", message)
    with pytest.raises(CacheError, match="weights_sha256"):
        sae.measure_replacement({"one": make(model=None)}, gpt2.cache, LanguageModel(str(other)))
    with pytest.raises(ConfigError, match="there is no transcoder to replace a module with; give at least one"):
        sae.measure_replacement({}, gpt2.cache, gpt2.model)


def test_too_little_text(gpt2: Case) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.downstream_tokens=8: none of the chosen contexts has a token"):
        gpt2.measure(settings=EvaluationConfig(downstream_tokens=8))


def test_one_document_has_no_standard_errors(gpt2: Case, tiny_model: Path, tmp_path: Path, text_folder: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number, source in enumerate(sorted(text_folder.iterdir())[:2]):
        (text / f"{number}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    settings = {"data.tokens": 60, "data.held_out_tokens": 60, "data.holdout_fraction": 0.5}
    cache = harvest(make_tiny_config(tiny_model, text, tmp_path / "run", settings), gpt2.model)
    report = sae.measure_replacement(gpt2.dictionaries, cache, gpt2.model, settings=EVERYTHING)
    assert report.documents == 1 and report.together["dictionary"].ce.standard_error is None
    text = " ".join(replacement_markdown(report).replace("\\_", "_").split())
    assert "No standard errors (–): they are over documents, and the held-out text has only one; harvest more" in text


def test_a_model_that_own_activations_change_is_refused(gpt2: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.evaluation.stand_ins.torch.clone", lambda x: x * 1.1)
    with pytest.raises(ModelError, match=r"^hooks? .*: putting back .* own activations (together )?changes the logits"):
        gpt2.measure()


def test_a_frame_that_normalises_its_input(gpt2: Case) -> None:
    """Scale and shift are of each token by itself, in the replaced model too."""
    reads, gives = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
    transcoder = make_transcoder(gpt2.cache, reads, gives, (32, 32))
    transcoder.set_frame(Frame("layer_norm", skip=True))
    generator = torch.Generator().manual_seed(8)
    for parameter in transcoder.requires_grad_(False).parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    report = gpt2.measure({**gpt2.dictionaries, gives: transcoder})
    losses = []
    for batch in gpt2.cache.contexts("held_out", batch_contexts=1):
        with torch.no_grad(), splice(gpt2.model, [transcoder, *list(gpt2.dictionaries.values())[1:]]):
            log_p = gpt2.model.logits(batch.tokens)[0, :-1].log_softmax(-1)
        losses.append(-log_p[torch.arange(len(log_p)), batch.tokens[0, 1:]][batch.eligible[0, :-1]])
    assert report.together["dictionary"].ce.value == pytest.approx(float(torch.cat(losses).double().mean()), rel=1e-6)
