"""Steering against activations that are moved by hand, in whole passes and in generation with a cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sae.architectures import ReLU, TopK
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.errors import ConfigError, ModelError, UnknownFeatureError
from sae.model.language_model import LanguageModel
from sae.model.steering import MODES, Steering, random_direction, steer
from sae.model.steering_effect import measure_steering
from tests.model.test_splicing import HOOK, make_dictionary


@pytest.fixture
def tokens(language_model: LanguageModel) -> Tensor:
    ids = torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = ids[1, 5] = language_model.bos
    return ids


def masked(language_model: LanguageModel, tokens: Tensor) -> Tensor:
    return (tokens == language_model.bos) | (torch.arange(tokens.shape[1]) == 0)


@contextlib.contextmanager
def seen(language_model: LanguageModel, hook: str = HOOK) -> Iterator[list[Tensor]]:
    """The activations that the bridge goes on with."""
    found: list[Tensor] = []
    with language_model.bridge.hooks(fwd_hooks=[(hook, lambda x, hook: found.append(x.clone()))]):
        yield found


def moved_by_hand(mode: str, f: Tensor, W_dec: Tensor, values: dict[int, float]) -> Tensor:
    """How far x moves, from features `[context, seq, d_sae]`."""
    after = {
        "add": lambda j, value: f[..., j] + value,
        "clamp": lambda j, value: torch.full_like(f[..., j], value),
        "scale": lambda j, value: f[..., j] * value,
        "ablate": lambda j, value: torch.zeros_like(f[..., j]),
    }[mode]
    return torch.stack([(after(j, value) - f[..., j])[..., None] * W_dec[j] for j, value in values.items()]).sum(0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [ReLU, TopK])
def test_the_activation_moves_by_the_change_along_the_directions(
    language_model: LanguageModel, tokens: Tensor, kind: type[Dictionary], mode: Any
) -> None:
    """And what the dictionary does not explain of it stays."""
    dictionary = make_dictionary(language_model, kind)
    x = language_model.bridge_activations(tokens, [HOOK])[HOOK]
    f = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    if kind is TopK:
        f = torch.where(f >= f.sort(-1).values[..., -4, None], f, 0)
    values = dict(zip(f.relu().sum((0, 1)).topk(2).indices.tolist(), (2.5, -1.5), strict=True))
    move = moved_by_hand(mode, f.relu(), dictionary.W_dec, values)
    expected = torch.where(masked(language_model, tokens)[..., None], x, x + move)
    with steer(language_model, dictionary, values, mode=mode) as steered, seen(language_model) as found:
        assert steered is language_model
        logits = language_model.logits(tokens)
        native = language_model.hf_model(tokens).logits
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
    assert float((found[0] - x).abs().max()) > 0.3
    by_hand = language_model.bridge(expected, start_at_layer=1)
    torch.testing.assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(native, by_hand, rtol=1e-4, atol=1e-4)


def test_what_is_not_changed_stays_to_the_last_bit(language_model: LanguageModel, tokens: Tensor) -> None:
    """A feature that never fires is scaled, every feature by 1, and tokens are left out."""
    dictionary, clean = make_dictionary(language_model, ReLU), language_model.logits(tokens)
    with steer(language_model, dictionary, dict.fromkeys(range(64), 1.0), mode="scale"):
        assert torch.equal(language_model.logits(tokens), clean)
    with steer(language_model, dictionary, {3: 9.0}, positions=[50]):
        assert torch.equal(language_model.logits(tokens), clean)
    with steer(language_model, dictionary, {3: 9.0}, positions=[7]):
        logits = language_model.logits(tokens)
    assert torch.equal(logits[:, :7], clean[:, :7])
    assert (logits[:, 7:] - clean[:, 7:]).abs().amax((1, 2)).min() > 0.01


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({}, lambda ids: torch.ones_like(ids, dtype=torch.bool)),
        ({"positions": "prompt"}, lambda ids: torch.ones_like(ids, dtype=torch.bool)),
        ({"positions": "generated"}, lambda ids: torch.zeros_like(ids, dtype=torch.bool)),
        ({"positions": range(4, 9)}, lambda ids: (torch.arange(12) >= 4).expand(3, -1) & (torch.arange(12) < 9)),
        ({"tokens": [17, 18]}, lambda ids: (ids == 17) | (ids == 18)),
        ({"tokens": [17], "positions": (3, 6)}, lambda ids: (ids == 17) & ((torch.arange(12) - 4.5).abs() == 1.5)),
    ],
)  # fmt: skip
def test_positions_and_tokens(
    language_model: LanguageModel, tokens: Tensor, settings: dict[str, Any], where: Callable[[Tensor], Tensor]
) -> None:
    tokens[0, 3] = tokens[1, 6] = tokens[2, 9] = 17
    tokens[2, 3] = 18
    dictionary = make_dictionary(language_model)
    x = language_model.bridge_activations(tokens, [HOOK])[HOOK]
    with steer(language_model, dictionary, {5: 4.0}, **settings), seen(language_model) as found:
        language_model.logits(tokens)
    changed = (found[0] - x).abs().amax(-1) > 1e-3
    assert changed.tolist() == (where(tokens) & ~masked(language_model, tokens)).tolist()


def test_tokens_as_texts(language_model: LanguageModel) -> None:
    text = "the river and the stone"
    tokens = language_model.to_tokens(text)
    texts = language_model.to_texts(tokens)[0]
    token = next(piece for piece in texts[2:] if texts.count(piece) == 1)
    dictionary = make_dictionary(language_model)
    x = language_model.bridge_activations(tokens, [HOOK])[HOOK]
    with steer(language_model, dictionary, {5: 4.0}, tokens=[token]), seen(language_model) as found:
        language_model.logits(tokens)
    changed = (found[0] - x).abs().amax(-1)[0] > 1e-3
    assert changed.nonzero()[:, 0].tolist() == [texts.index(token)]
    with pytest.raises(
        ConfigError, match=r"token 'the river': tiny reads it as \d+ tokens .*give the text of a single one"
    ):
        steer(language_model, dictionary, {5: 4.0}, tokens=["the river"]).__enter__()


@torch.no_grad()
def generated_by_hand(
    language_model: LanguageModel, dictionary: Dictionary, prompt: str, count: int, steering: Steering
) -> list[int]:
    """Greedy, one whole pass for each token, in which the places that are steered are given as numbers."""
    tokens = language_model.to_tokens(prompt)
    length = tokens.shape[1]
    places = {"all": range(100), "prompt": range(length), "generated": range(length, 100)}
    positions = places[steering.positions] if isinstance(steering.positions, str) else steering.positions
    with steer(language_model, dictionary, Steering(steering.features, steering.mode, tuple(positions))):
        for _ in range(count):
            tokens = torch.cat([tokens, language_model.logits(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0, length:].tolist()


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", (2, 3, 9)])
@pytest.mark.parametrize(("mode", "value"), [("add", 6.0), ("clamp", 4.0), ("scale", 5.0), ("ablate", 0.0)])
def test_generation_with_a_cache_and_padding(
    language_model: LanguageModel, positions: Any, mode: Any, value: float
) -> None:
    prompts = ["the river", "a stone and a house under the silver road", "letters", "one"]
    dictionary = make_dictionary(language_model, ReLU)
    steering = Steering({5: value, 30: value}, mode, positions)
    with steer(language_model, dictionary, steering):
        made = language_model.generate(prompts, max_new_tokens=8, stop=False)
    expected = [generated_by_hand(language_model, dictionary, prompt, 8, steering) for prompt in prompts]
    assert [one.tokens for one in made] == expected
    if (mode, positions) == ("add", "all"):
        assert made != language_model.generate(prompts, max_new_tokens=8, stop=False)


def test_blocks_are_nested(language_model: LanguageModel, tokens: Tensor) -> None:
    """The second sees what the first has changed: an ablated feature has nothing to scale."""
    dictionary = make_dictionary(language_model, ReLU)
    with (
        steer(language_model, dictionary, {3: 2.0}),
        steer(language_model, dictionary, {40: 1.0}),
        seen(language_model) as both,
    ):
        language_model.logits(tokens)
    with steer(language_model, dictionary, {3: 2.0, 40: 1.0}), seen(language_model) as at_once:
        language_model.logits(tokens)
    torch.testing.assert_close(both[0], at_once[0], rtol=1e-5, atol=1e-5)


def test_a_random_direction_is_as_long_at_each_token(language_model: LanguageModel, tokens: Tensor) -> None:
    dictionary = make_dictionary(language_model, ReLU)
    x = language_model.bridge_activations(tokens, [HOOK])[HOOK]
    moves = []
    for random in (None, 0, 1):
        with steer(language_model, dictionary, {5: 3.0}, mode="clamp", random=random), seen(language_model) as found:
            language_model.logits(tokens)
        moves.append(found[0] - x)
    own, first, second = moves
    for move in (first, second):
        torch.testing.assert_close(move.norm(dim=-1), own.norm(dim=-1), rtol=1e-4, atol=1e-5)
    counted = ~masked(language_model, tokens)
    directions = first[counted] / first[counted].norm(dim=-1, keepdim=True)
    torch.testing.assert_close(directions @ random_direction(0, dictionary), torch.ones(len(directions)))
    assert float((first - second).abs().max()) > 0.1
    draws = torch.stack([random_direction(seed, dictionary) for seed in range(400)])
    torch.testing.assert_close(draws.T @ draws / 400, torch.eye(32) / 32, rtol=0, atol=0.02)


def test_a_transcoder_is_steered_at_its_target(language_model: LanguageModel, tokens: Tensor) -> None:
    dictionary = make_dictionary(language_model, ReLU, hook=HOOK)
    target = "blocks.1.hook_mlp_out"
    x, y = (language_model.bridge_activations(tokens, [hook])[hook] for hook in (HOOK, target))
    f = ((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc).relu()
    expected = torch.where(
        masked(language_model, tokens)[..., None], y, y + (2 - f[..., 7, None]) * dictionary.W_dec[7]
    )
    with (
        steer(language_model, dictionary, {7: 2.0}, mode="clamp", target_hook=target),
        seen(language_model, target) as found,
    ):
        language_model.logits(tokens)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_what_steering_does_to_prompts(language_model: LanguageModel) -> None:
    """KL from the definition, texts from generation, and the largest activations of the prompts."""
    prompts = ["the river", "a stone and a house under the silver road"]
    dictionary = make_dictionary(language_model, ReLU)
    effect = measure_steering(language_model, dictionary, prompts, {5: 6.0}, max_new_tokens=5, random_directions=3)
    assert (effect.hook, [one.prompt for one in effect.prompts]) == (HOOK, prompts)
    for one in effect.prompts:
        tokens = language_model.to_tokens(one.prompt)
        own = language_model.logits(tokens)[0, -1].double().log_softmax(-1).tolist()
        for random, kl, text in (
            (None, one.kl, one.after),
            (0, one.random_kl[0], one.random),
            (2, one.random_kl[2], None),
        ):
            with steer(language_model, dictionary, {5: 6.0}, random=random):
                other = language_model.logits(tokens)[0, -1].double().log_softmax(-1).tolist()
                made = language_model.generate(one.prompt, max_new_tokens=5)[0].text
            expected = sum(math.exp(p) * (p - q) for p, q in zip(own, other, strict=True))
            assert kl == pytest.approx(expected, rel=1e-3, abs=1e-6)
            assert text is None or text == made
        assert one.before == language_model.generate(one.prompt, max_new_tokens=5)[0].text
        assert one.kl > 1e-3
    largest = 0.0
    for prompt in prompts:
        tokens = language_model.to_tokens(prompt)
        f = dictionary.encode(language_model.bridge_activations(tokens, [HOOK])[HOOK])
        largest = max(largest, float(f[0, 1:, 5].max()))
    assert effect.in_prompts[5] == pytest.approx(largest, rel=1e-4, abs=1e-5)
    assert effect.to_json()["prompts"][0]["kl"] == effect.prompts[0].kl


def test_the_same_seed_samples_for_every_model(language_model: LanguageModel) -> None:
    """Steering by nothing leaves sampled text as it is."""
    effect = measure_steering(
        language_model, make_dictionary(language_model, ReLU), "the river", Steering({5: 1.0}, "scale"),
        max_new_tokens=12, seed=5, random_directions=1,
    )  # fmt: skip
    [one] = effect.prompts
    assert one.before == one.after == one.random
    assert (one.kl, one.random_kl) == (0.0, (0.0,))


def test_what_cannot_be_steered_is_refused(language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    dictionary = make_dictionary(language_model)
    for arguments, error, message in (
        (({64: 1.0},), UnknownFeatureError, "feature 64: the dictionary has features 0 to 63"),
        (({-1: 1.0},), UnknownFeatureError, "feature -1: the dictionary has features 0 to 63"),
        (({},), ConfigError, "there is no feature to steer with"),
        (({1: math.nan},), ConfigError, "feature 1: nan is not a finite number"),
        (([7],), ConfigError, r"mode='add': give a value for each feature, as in \{7: 8.0\}"),
    ):
        with pytest.raises(error, match=message):
            steer(language_model, dictionary, *arguments).__enter__()
    with pytest.raises(ConfigError, match="positions='last': expected all, prompt, generated, or numbers from 0"):
        steer(language_model, dictionary, {1: 1.0}, positions="last").__enter__()
    for settings, message in (
        ({"positions": ()}, "there is no position to steer at: give numbers from 0"),
        ({"positions": [3, -1]}, "positions: -1 is negative; positions are counted from the text's start"),
        ({"tokens": []}, "there is no token to steer at"),
    ):
        with pytest.raises(ConfigError, match=message):
            steer(language_model, dictionary, {1: 1.0}, **settings).__enter__()
    for token in (-1, language_model.rows):
        with pytest.raises(ConfigError, match=f"token {token}: .* has tokens 0 to {language_model.rows - 1}"):
            steer(language_model, dictionary, {1: 1.0}, tokens=[token]).__enter__()
    with monkeypatch.context() as patched:
        patched.setattr(language_model, "rows", 5)
        with pytest.raises(ConfigError, match=r"token 'a', with the id \d+: .* has tokens 0 to 4"):
            steer(language_model, dictionary, {1: 1.0}, tokens=["a"]).__enter__()
    with pytest.raises(ConfigError, match="given twice: a Steering has them already"):
        steer(language_model, dictionary, Steering({1: 1.0}), positions="prompt").__enter__()
    with pytest.raises(ConfigError, match="random_directions=0: expected at least 1"):
        measure_steering(language_model, dictionary, "a", {1: 1.0}, random_directions=0)
    with steer(language_model, dictionary, [1, 2], mode="ablate", tokens=[5]):
        embeddings = language_model.hf_model.get_input_embeddings()(torch.tensor([[5, 6]]))
        with pytest.raises(ModelError, match="a pass over embeddings has none; give the model token ids"):
            language_model.hf_model(inputs_embeds=embeddings)


def test_a_feature_of_a_normalised_token_moves_it_by_the_token_s_scale(
    language_model: LanguageModel, tokens: Tensor
) -> None:
    dictionary = make_dictionary(language_model)
    dictionary.set_frame(Frame("layer_norm"))
    generator = torch.Generator().manual_seed(5)
    for parameter in dictionary.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    x = language_model.bridge_activations(tokens, [HOOK])[HOOK]
    expected = x + 4.0 * x.std(-1, keepdim=True) * dictionary.W_dec[3]
    with steer(language_model, dictionary.requires_grad_(False), {3: 4.0}), seen(language_model) as found:
        language_model.logits(tokens)
    kept = masked(language_model, tokens)
    torch.testing.assert_close(found[0], torch.where(kept[..., None], x, expected), rtol=1e-4, atol=1e-4)
