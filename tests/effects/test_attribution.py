"""Attributions against plain autograd through dense features, finite differences, a linear model, and their sums."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sae
from sae.dictionary.frame import Frame
from sae.effects import Contribution, NextToken
from sae.model.language_model import LanguageModel
from sae.numerics.seeding import numpy_generator
from tests.support.attribution_case import (
    BEFORE_MLP,
    MLP,
    POST,
    RESID,
    by_autograd,
    dense,
    function_of_features,
    in_float64,
    make_dictionary,
    make_tokens,
    masked,
    relu_dictionary,
)

GRADIENT = "gradient_activation"


def difference(logits: Tensor) -> Tensor:
    """One number per context: a logit difference at the last position plus a log-probability before it."""
    return logits[:, -1, 7] - logits[:, -1, 11] + logits.log_softmax(-1)[:, 5, 3]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    """The tiny model in float64. Read only."""
    return in_float64(tiny_model)


@pytest.fixture(scope="module")
def tokens(model: LanguageModel) -> Tensor:
    return make_tokens(model)


@pytest.fixture(scope="module")
def linear_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A tiny OPT without a final norm: logits are linear in the last block's output."""
    import shutil

    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("opt") / "opt"
    shutil.copytree(tiny_model, folder)  # for the tokenizer
    config = OPTConfig(
        vocab_size=400, hidden_size=32, word_embed_proj_dim=24, ffn_dim=48, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=32, do_layer_norm_before=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        opt = OPTForCausalLM(config).eval().requires_grad_(False)
        for parameter in opt.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    opt.save_pretrained(folder)
    return in_float64(folder)


@pytest.mark.parametrize("kind", [sae.TopK, sae.ReLU])
@pytest.mark.parametrize("hook", [RESID, POST, "blocks.1.attn.hook_z"])
def test_gradient_times_activation_is_that_of_autograd(
    model: LanguageModel, tokens: Tensor, hook: str, kind: type[sae.Dictionary]
) -> None:
    dictionary = make_dictionary(model, hook, kind)
    expected = by_autograd(model, dictionary, tokens, difference, [1.0])
    found = sae.attribute(dictionary, model, tokens, of=difference, method=GRADIENT)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(dense(found, 48), expected, rtol=1e-9, atol=1e-12)
    assert found.steps == 1 and found.of == "difference"


@pytest.mark.parametrize("frame", [Frame("layer_norm"), Frame("constant_norm", skip=True)], ids=["layer", "skip"])
def test_a_dictionary_that_normalises_each_token(model: LanguageModel, tokens: Tensor, frame: Frame) -> None:
    """ŷ is affine in the features, given the token; the sum of integrated gradients is what their removal changes."""
    dictionary = relu_dictionary(model)
    dictionary.set_frame(frame)
    generator = torch.Generator().manual_seed(7)
    for parameter in dictionary.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    expected = by_autograd(model, dictionary, tokens, difference, [1.0])
    found = sae.attribute(dictionary, model, tokens, of=difference, method=GRADIENT)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(dense(found, 48), expected, rtol=1e-9, atol=1e-12)
    path = sae.attribute(dictionary, model, tokens, of=difference, steps=64)
    [part] = path.dictionaries
    for total, value, baseline in zip(part.total, part.value, part.baseline, strict=True):
        assert total == pytest.approx(value - baseline, rel=1e-6)


def test_gradients_are_finite_differences(model: LanguageModel, tokens: Tensor) -> None:
    """(m(f + h) − m(f − h)) / 2h for the entries with the largest attributions."""
    dictionary, step = relu_dictionary(model), 1e-5
    found = sae.attribute(dictionary, model, tokens, of=difference, method=GRADIENT)
    for entry in found.top(6):

        def moved(by: float, entry: Contribution = entry) -> float:
            def change(features: Tensor) -> Tensor:
                features = features.clone()
                features[entry.context, entry.position, entry.feature] += by
                return features

            return float(function_of_features(model, dictionary, tokens, difference, change).detach())

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert entry.attribution == pytest.approx(entry.activation * slope, rel=1e-5)


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_integrated_gradients_are_the_mean_along_the_path(model: LanguageModel, tokens: Tensor, hook: str) -> None:
    """400 equally spaced points, by autograd through dense features."""
    dictionary = relu_dictionary(model, hook=hook)
    expected = by_autograd(model, dictionary, tokens, difference, [(i + 0.5) / 400 for i in range(400)])
    found = sae.attribute(dictionary, model, tokens, of=difference, steps=64)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(dense(found, 48), expected, rtol=1e-4, atol=1e-5)
    of_gradient = sae.attribute(dictionary, model, tokens, of=difference, method=GRADIENT)
    assert (dense(of_gradient, 48) - expected).abs().max() > 0.01, "the path matters"


def test_each_group_adds_up_to_the_effect_of_its_removal(model: LanguageModel, tokens: Tensor) -> None:
    """With a group for each entry, an attribution is what the ablation of its feature measures."""
    dictionary = make_dictionary(model)
    settings = {"of": difference, "steps": 24, "error_term": True}
    whole, three, alone = (
        sae.attribute(dictionary, model, tokens, groups=groups, **settings) for groups in (1, 3, 1000)
    )  # fmt: skip
    assert (whole.groups, three.groups, alone.groups) == (1, 3, 1000)
    assert alone.dictionaries[0].baseline == whole.dictionaries[0].baseline
    for name in ("context", "position", "feature", "activation"):
        assert np.array_equal(getattr(alone, name), getattr(whole, name))
        assert np.array_equal(getattr(three, name), getattr(whole, name))

    def removed(entries: np.ndarray) -> float:
        def change(features: Tensor) -> Tensor:
            features = features.clone()
            features[alone.context[entries], alone.position[entries], alone.feature[entries]] = 0
            return features

        values = [function_of_features(model, dictionary, tokens, difference, edit) for edit in (torch.clone, change)]
        return float((values[0] - values[1]).detach())

    fires = np.flatnonzero(alone.feature >= 0)
    assert 10 < len(fires) < 1000
    for entry in fires[np.argsort(-abs(alone.attribution[fires]))[:5]]:
        assert alone.attribution[entry] == pytest.approx(removed(np.array([entry])), rel=1e-6)
    assert np.corrcoef(alone.attribution[fires], whole.attribution[fires])[0, 1] < 0.999
    with torch.no_grad():
        clean = difference(model.bridge(tokens)).sum()
        with sae.splice(model, dictionary):
            without_errors = difference(model.bridge(tokens)).sum()
    assert three.attribution[three.feature < 0].sum() == pytest.approx(float(clean - without_errors), rel=1e-5)
    group = numpy_generator("groups of attributions").permutation(len(fires)) % 3
    for number in range(3):
        chosen = fires[group == number]
        assert three.attribution[chosen].sum() == pytest.approx(removed(chosen), rel=1e-5)


def test_where_nothing_fires_groups_are_one_path(model: LanguageModel, tokens: Tensor) -> None:
    """What is left to attribute is the errors: the same with groups as without."""
    dictionary = relu_dictionary(model)
    with torch.no_grad():
        dictionary.b_enc.fill_(-1e6)
    settings = {"of": difference, "steps": 24, "error_term": True}
    one, several = (sae.attribute(dictionary, model, tokens, groups=groups, **settings) for groups in (1, 8))
    assert len(several.feature) > 0
    assert (several.feature < 0).all()
    assert np.array_equal(several.feature, one.feature)
    assert np.array_equal(several.attribution, one.attribution)
    assert len(sae.attribute(dictionary, model, tokens, of=difference, groups=8).feature) == 0


def test_integrated_gradients_add_up(model: LanguageModel, tokens: Tensor) -> None:
    """The gap shrinks with the number of steps; the baseline is the function with all features at 0."""
    dictionary = relu_dictionary(model)
    results = [sae.attribute(dictionary, model, tokens, of=difference, steps=n).dictionaries[0] for n in (1, 4, 16, 64)]
    with torch.no_grad():
        value = difference(model.bridge(tokens))
        with sae.splice(model, dictionary, error_term=True, edit=torch.zeros_like):
            baseline = difference(model.bridge(tokens))
    last = results[-1]
    assert last.value == pytest.approx(value.tolist(), rel=1e-12)
    assert last.baseline == pytest.approx(baseline.tolist(), rel=1e-9)
    assert last.total == pytest.approx((value - baseline).tolist(), rel=1e-6)
    gaps = [abs(result.gap) for result in results]
    assert all(later < earlier / 3 for earlier, later in itertools.pairwise(gaps)), gaps
    assert last.relative_gap is not None and last.relative_gap < 1e-6


def test_where_the_model_is_linear_gradients_are_exact(linear_model: LanguageModel) -> None:
    """Each attribution is the measured change when that feature becomes 0 there, and they add up without a path."""
    tokens = make_tokens(linear_model)
    dictionary = make_dictionary(linear_model, POST)
    of = NextToken(token=7, minus=11, position=5)

    def logits_apart(logits: Tensor) -> Tensor:
        return logits[:, 5, 7] - logits[:, 5, 11]

    found = sae.attribute(dictionary, linear_model, tokens, of=of, method=GRADIENT)
    assert found.dictionaries[0].relative_gap is not None and found.dictionaries[0].relative_gap < 1e-12
    clean = function_of_features(linear_model, dictionary, tokens, logits_apart, lambda features: features)
    entries = [entry for entry in found.top() if entry.position == 5]
    assert len(entries) == 8 and all(abs(entry.attribution) > 1e-4 for entry in entries)
    for entry in entries:

        def ablate(features: Tensor, entry: Contribution = entry) -> Tensor:
            features = features.clone()
            features[entry.context, entry.position, entry.feature] = 0
            return features

        ablated = function_of_features(linear_model, dictionary, tokens, logits_apart, ablate)
        assert entry.attribution == pytest.approx(float((clean - ablated).detach()), rel=1e-9)
    integrated = sae.attribute(dictionary, linear_model, tokens, of=of, steps=2)
    np.testing.assert_allclose(integrated.attribution, found.attribution, rtol=1e-9, atol=1e-13)


def test_a_batch_is_its_contexts(model: LanguageModel, tokens: Tensor) -> None:
    dictionary = relu_dictionary(model)
    together = sae.attribute(dictionary, model, tokens, of=NextToken(5), steps=5)
    assert len(together.value) == 2
    for context in range(2):
        alone = sae.attribute(dictionary, model, tokens[context], of=NextToken(5), steps=5)
        own = together.context == context
        np.testing.assert_allclose(alone.attribution, together.attribution[own], rtol=1e-9, atol=1e-12)
        assert (alone.feature == together.feature[own]).all() and (alone.position == together.position[own]).all()
        assert alone.value[0] == pytest.approx(together.value[context], rel=1e-12)
        assert alone.dictionaries[0].total[0] == pytest.approx(together.dictionaries[0].total[context], rel=1e-9)


def test_one_number_for_all_contexts(model: LanguageModel, tokens: Tensor) -> None:
    def together(logits: Tensor) -> Tensor:
        return logits[0, -1, 3] * logits[1, -1, 4]

    dictionary = make_dictionary(model)
    found = sae.attribute(dictionary, model, tokens, of=together, steps=24)
    assert len(found.value) == 1 and {*found.context.tolist()} == {0, 1}
    torch.testing.assert_close(
        dense(found, 48), by_autograd(model, dictionary, tokens, together, [(i + 0.5) / 200 for i in range(200)]),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip
    assert found.dictionaries[0].total[0] == pytest.approx(found.attribution.sum())


def test_many_steps_take_several_passes(model: LanguageModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = make_dictionary(model)
    whole = sae.attribute(dictionary, model, tokens, of=difference, steps=7)
    vocabulary = model.bridge.cfg.d_vocab
    monkeypatch.setattr("sae.effects.attribution_paths._LOGITS", 3 * tokens.numel() * vocabulary)
    reports: list[tuple[str, int, int]] = []
    parts = sae.attribute(
        dictionary, model, tokens, of=difference, steps=7, progress=lambda *report: reports.append(report)
    )
    np.testing.assert_allclose(parts.attribution, whole.attribution, rtol=1e-9, atol=1e-12)
    assert reports == [("attribute", done, 7) for done in (0, 3, 6, 7)]


def test_several_dictionaries_are_each_attributed_to(model: LanguageModel, tokens: Tensor) -> None:
    """An early feature's attribution includes what it does through the later hook point."""
    several = [make_dictionary(model, RESID), relu_dictionary(model, hook=POST, seed=3), make_dictionary(model, MLP)]
    found = sae.attribute(several, model, tokens, of=difference, steps=4)
    assert [part.gives for part in found.dictionaries] == [RESID, POST, MLP]
    for number, dictionary in enumerate(several):
        alone = sae.attribute(dictionary, model, tokens, of=difference, steps=4)
        part = found.of_dictionary(number)
        assert part.dictionaries == alone.dictionaries and (part.dictionary == 0).all()
        np.testing.assert_array_equal(part.attribution, alone.attribution)
        assert abs(part.attribution).max() > 0.01
    assert len(found) == sum(len(found.of_dictionary(number)) for number in range(3))
    assert {entry.hook for entry in found.top()} == {RESID, POST, MLP}


def test_transcoders_are_attributed_to_where_they_write(model: LanguageModel, tokens: Tensor) -> None:
    transcoder = relu_dictionary(model, hook=BEFORE_MLP, target_hook=MLP)
    shares = [(i + 0.5) / 200 for i in range(200)]
    expected = by_autograd(model, transcoder, tokens, difference, shares)
    found = sae.attribute(transcoder, model, tokens, of=difference, steps=48)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(dense(found, 48), expected, rtol=1e-3, atol=1e-4)
    result = found.dictionaries[0]
    assert (result.reads, result.gives) == (BEFORE_MLP, MLP)
    assert result.relative_gap is not None and result.relative_gap < 1e-4


def test_masked_tokens_have_no_entries(model: LanguageModel, tokens: Tensor) -> None:
    mask = masked(model, tokens)
    found = sae.attribute(make_dictionary(model), model, tokens, of=difference, steps=2, error_term=True)
    places = {*zip(found.context.tolist(), found.position.tolist(), strict=True)}
    assert places == {*map(tuple, (~mask).nonzero().tolist())}
    everywhere = sae.attribute(make_dictionary(model, tokens=None), model, tokens, of=difference, steps=2)
    assert len({*zip(everywhere.context.tolist(), everywhere.position.tolist(), strict=True)}) == tokens.numel()


@pytest.mark.parametrize("method", [GRADIENT, "integrated_gradients"])
def test_the_error_is_attributed_to_along_the_same_path(model: LanguageModel, tokens: Tensor, method: str) -> None:
    """y(α) = b_dec + α (y − b_dec) where tokens count: the plain way, on the activation itself."""
    dictionary = make_dictionary(model)
    counts = ~masked(model, tokens)
    y = model.bridge_activations(tokens, RESID)[RESID]
    shares = [1.0] if method == GRADIENT else [(i + 0.5) / 400 for i in range(400)]
    mean = torch.zeros_like(y)
    for share in shares:
        leaf = (dictionary.b_dec + share * (y - dictionary.b_dec)).detach().requires_grad_()
        with model.replacing(RESID, functools.partial(torch.where, counts[..., None], leaf)):
            value = difference(model.bridge(tokens)).sum()
        mean += torch.autograd.grad(value, leaf)[0] / len(shares)
    error = y - dictionary(y).detach()
    expected = (error * mean).sum(-1)[counts]
    found = sae.attribute(
        dictionary,
        model,
        tokens,
        of=difference,
        method=method,
        steps=None if method == GRADIENT else 64,
        error_term=True,
    )
    errors = found.feature == -1
    assert expected.abs().max() > 0.01
    np.testing.assert_allclose(found.attribution[errors], expected.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.activation[errors], error[counts].norm(dim=-1).numpy(), rtol=1e-9)
    features = dictionary.encode(y).detach() * counts[..., None]
    torch.testing.assert_close(dense(found, 48), features * (mean @ dictionary.W_dec.detach().T), rtol=1e-3, atol=1e-4)
    with torch.no_grad(), model.replacing(RESID, lambda own: torch.where(counts[..., None], dictionary.b_dec, own)):
        baseline = difference(model.bridge(tokens))
    result = found.dictionaries[0]
    assert result.baseline == pytest.approx(baseline.tolist(), rel=1e-9)
    if method != GRADIENT:
        assert result.relative_gap is not None and result.relative_gap < 1e-4


def test_named_numbers(model: LanguageModel, tokens: Tensor) -> None:
    with torch.no_grad():
        logits = model.bridge(tokens)
    dictionary, log_p = make_dictionary(model), logits.log_softmax(-1)
    cases = {
        NextToken(7): logits[:, -1, 7],
        NextToken(7, minus=9, position=4): logits[:, 4, 7] - logits[:, 4, 9],
        NextToken(7, position=-3, log_probability=True): log_p[:, -3, 7],
        NextToken(): logits[:, -1].amax(-1),
    }
    for of, expected in cases.items():
        found = sae.attribute(dictionary, model, tokens, of=of, method=GRADIENT)
        assert found.value == pytest.approx(expected.tolist(), rel=1e-12)
    assert sae.attribute(dictionary, model, tokens, method=GRADIENT).value == pytest.approx(
        logits[:, -1].amax(-1).tolist()
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_left_behind(language_model: LanguageModel, mode: type) -> None:
    """Neither gradients nor changes of the model, whatever the caller's modes; float32, text, and trainable weights."""
    dictionary = make_dictionary(language_model).float().requires_grad_()
    text = "The river keeps a stone"
    tokens = language_model.to_tokens(text)
    with torch.no_grad():
        clean = language_model.logits(tokens)
    expected = sae.attribute(dictionary, language_model, text, of=NextToken(7), steps=3)
    with mode():
        found = sae.attribute(dictionary, language_model, text, of=NextToken(7), steps=3)
    np.testing.assert_array_equal(found.attribution, expected.attribution)
    assert all(parameter.grad is None for parameter in dictionary.parameters())
    torch.testing.assert_close(language_model.logits(tokens), clean, rtol=0, atol=0)
    assert found.texts == (tuple(language_model.to_texts(tokens)[0]),)
    assert found.value[0] == pytest.approx(float(clean[0, -1, 7]), rel=1e-6)
    assert math.isfinite(found.attribution.sum()) and abs(found.attribution).max() > 1e-3
