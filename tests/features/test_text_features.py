"""Features of texts against the encoder's formula, token by token."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.architectures import ReLU, TopK
from sae.config.settings import FeaturesConfig
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError, ModelError, UnknownFeatureError
from sae.features import collect
from sae.features.text_features import text_features
from sae.model.language_model import LanguageModel
from tests.model.test_splicing import HOOK, make_dictionary

TEXT = "The river remembers a letter.\nNever the stone\tand naïve houses — again"


def by_hand(model: LanguageModel, dictionary: Dictionary, text: str) -> tuple[list[int], list[dict[int, float]]]:
    """Ids, and activations of the features that fire at each token; none at BOS."""
    ids = [model.bos, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
    x = model.bridge(torch.tensor([ids]), stop_at_layer=1)[0]
    f = (x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc
    if isinstance(dictionary, TopK):
        f = torch.where(f >= f.sort(-1).values[..., -4, None], f, 0)
    fire = [{j: value for j, value in enumerate(row) if value > 0} for row in f.relu().tolist()]
    return ids, [{}, *fire[1:]]


@pytest.mark.parametrize("kind", [ReLU, TopK])
def test_each_token_has_its_features(language_model: LanguageModel, kind: type[Dictionary]) -> None:
    dictionary = make_dictionary(language_model, kind)
    ids, expected = by_hand(language_model, dictionary, TEXT)
    result = text_features(dictionary, language_model, TEXT, top=5)
    assert [token.token for token in result.tokens] == ids
    assert "".join(token.text for token in result.tokens[1:]) == TEXT
    assert [token.masked for token in result.tokens] == [True] + [False] * (len(ids) - 1)
    for token, fire in zip(result.tokens, expected, strict=True):
        assert {firing.feature for firing in token.firing} == fire.keys()
        values = [firing.activation for firing in token.firing]
        assert values == sorted(values, reverse=True)
        for firing in token.firing:
            assert firing.activation == pytest.approx(fire[firing.feature], rel=1e-4, abs=1e-5)
    assert (result.hook, result.d_sae) == (HOOK, 64)
    assert result.fired == len({feature for fire in expected for feature in fire})


def test_the_strongest_features_of_the_text(language_model: LanguageModel) -> None:
    dictionary = make_dictionary(language_model, ReLU)
    _, expected = by_hand(language_model, dictionary, TEXT)
    largest: dict[int, float] = {}
    for fire in expected:
        for feature, value in fire.items():
            largest[feature] = max(largest.get(feature, 0.0), value)
    order = sorted(largest, key=lambda feature: -largest[feature])[:6]
    result = text_features(dictionary, language_model, TEXT, top=6)
    assert [one.feature for one in result.features] == order
    for one in result.features:
        activations = [fire.get(one.feature, 0.0) for fire in expected]
        assert one.activations == pytest.approx(activations, rel=1e-4, abs=1e-5)
        assert one.max == pytest.approx(max(activations), rel=1e-4)
        assert one.position == activations.index(max(activations))
        assert one.count == sum(value > 0 for value in activations)
        assert one.known is None
    chosen = text_features(dictionary, language_model, TEXT, features=[9, 3, 9]).features
    assert [one.feature for one in chosen] == [9, 3]


def test_a_feature_that_does_not_fire(language_model: LanguageModel) -> None:
    dictionary = make_dictionary(language_model, ReLU)
    dictionary.b_enc.data[4] = -100.0
    [one] = text_features(dictionary, language_model, TEXT, features=[4]).features
    assert (one.max, one.position, one.count, set(one.activations)) == (0.0, None, 0, {0.0})
    dictionary.b_enc.data[:] = -100.0
    silent = text_features(dictionary, language_model, TEXT)
    assert (silent.features, silent.fired) == ((), 0)
    assert all(token.firing == () for token in silent.tokens)


def test_a_text_longer_than_the_model_reads_is_cut(language_model: LanguageModel) -> None:
    """Into contexts of 64 tokens with BOS, each of which is a text of its own."""
    dictionary, text = make_dictionary(language_model), " ".join([TEXT] * 6)
    ids = language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 130
    result = text_features(dictionary, language_model, text)
    starts = [place for place, token in enumerate(result.tokens) if token.masked]
    assert starts == list(range(0, len(result.tokens), 64))
    assert len(result.tokens) == len(ids) + len(starts)
    assert "".join(token.text for token in result.tokens if not token.masked) == text
    x = language_model.bridge(torch.tensor([[language_model.bos, *ids[63:126]]]), stop_at_layer=1)[0]
    values, indices = dictionary.encode_sparse(x)
    for place in (1, 40, 63):
        firing = result.tokens[64 + place].firing
        assert [one.feature for one in firing] == indices[place][values[place] > 0].tolist()


@pytest.fixture
def stored(language_model: LanguageModel, tiny_cache: Any, tmp_path: Path) -> tuple[Dictionary, Any]:
    dictionary = make_dictionary(language_model)
    store = collect(
        dictionary, tiny_cache, tmp_path / "features", FeaturesConfig(tokens=500), hook=HOOK,
        tokenizer=language_model.tokenizer,
    )  # fmt: skip
    return dictionary, store


def test_what_a_store_knows(language_model: LanguageModel, stored: Any) -> None:
    dictionary, store = stored
    result = text_features(dictionary, language_model, TEXT, store=store.path, top=64)
    for one in result.features:
        entry = store[one.feature]
        assert one.known is not None
        assert dataclasses.astuple(one.known) == (entry.density, entry.max, entry.mean, tuple(entry.peek))
    density = store.summary().density
    most = float(density[[one.feature for one in result.features]].median())
    rare = text_features(dictionary, language_model, TEXT, store=store, top=64, max_density=most)
    kept = {one.feature for one in result.features if density[one.feature] <= most}
    assert 0 < len(kept) < len(result.features)
    assert {one.feature for one in rare.features} == kept
    assert {firing.feature for token in rare.tokens for firing in token.firing} == kept
    assert rare.fired == len(kept)
    dense = next(one for one in result.features if one.feature not in kept)
    [asked] = text_features(
        dictionary, language_model, TEXT, store=store, features=[dense.feature], max_density=most
    ).features
    assert asked == dense and asked.count > 0


def test_what_cannot_be_shown_is_refused(language_model: LanguageModel, stored: Any) -> None:
    dictionary, store = stored
    for settings, error, message in (
        ({"features": [64]}, UnknownFeatureError, "feature 64: the dictionary has features 0 to 63"),
        (
            {"max_density": 0.1},
            ConfigError,
            r"max_density=0\.1: .* from a feature store only; collect one with 'sae fea",
        ),
    ):
        with pytest.raises(error, match=message):
            text_features(dictionary, language_model, TEXT, **settings)
    with pytest.raises(ConfigError, match="the text has no tokens"):
        text_features(dictionary, language_model, "")
    with pytest.raises(ConfigError, match="has 64 features, the dictionary 8; give the store of this dictionary"):
        text_features(TopK(32, 8, k=2, metadata=dictionary.metadata), language_model, TEXT, store=store)
    changed = make_dictionary(language_model)
    changed.b_enc.data += 0.01
    with pytest.raises(ConfigError, match="from other weights than the dictionary's; give the store of this"):
        text_features(changed, language_model, TEXT, store=store)
    other = make_dictionary(language_model, model={**language_model.info.to_json(), "weights_sha256": "0" * 64})
    with pytest.raises(ModelError, match="not the dictionary's model"):
        text_features(other, language_model, TEXT)
    with pytest.raises(ModelError, match="does not record its hook point"):
        text_features(make_dictionary(language_model, hook=None), language_model, TEXT)
    with pytest.raises(ConfigError, match=r"the text has 1\d\d,\d{3} tokens: give at most 100,000"):
        text_features(dictionary, language_model, "the " * 100_500)
