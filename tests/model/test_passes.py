"""First positions are those of a text, however many passes read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import write_model
from family_configs import FAMILIES
from torch import Tensor, nn

from sae.config.sources import ModelConfig
from sae.errors import ModelError
from sae.model.language_model import LanguageModel
from sae.model.passes import BEYOND, Passes, positions
from sae.model.splicing import splice
from tests.model.test_splicing import make_dictionary

TEXT = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(ModelConfig(name=str(write_model("mamba", tmp_path_factory.mktemp("mamba") / "mamba"))))


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return LanguageModel(ModelConfig(name=str(write_model("mamba2", tmp_path_factory.mktemp("mamba2") / "mamba2"))))


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "rwkv", {"attention_hidden_size": 32, "context_length": 64})
        return LanguageModel(ModelConfig(name=str(write_model("rwkv", tmp_path_factory.mktemp("rwkv") / "rwkv"))))


def spliced(model: LanguageModel, masked: int = 1) -> Any:
    policy = model.token_policy(prepend_bos=True, masked_positions=masked, mask_special_tokens=False)
    return splice(model, make_dictionary(model, tokens=policy.to_json()))


@contextlib.contextmanager
def seen_positions(model: LanguageModel) -> Iterator[list[Any]]:
    """Of every pass while open, `[context][seq]`."""
    seen: list[Any] = []

    def look(x: Tensor, now: Any) -> Tensor:
        seen.append(now.positions.tolist())
        return x

    with model.replacing("blocks.1.hook_resid_pre", look, with_pass=True):
        yield seen


def in_parts(model: LanguageModel, text: Tensor, ends: list[int]) -> Tensor:
    """Logits of a text read part by part with the model's own cache."""
    found, cache, start = [], {}, 0
    for end in ends:
        output = model.bridge.original_model(text[:, start:end], use_cache=True, **cache)
        found.append(output.logits)
        name = next(name for name in ("cache_params", "state", "past_key_values") if name in output)
        cache, start = {name: output[name]}, end
    return torch.cat(found, 1)


@pytest.mark.parametrize("ends", [[5, 12], [1, 2, 3, 12], [11, 12], [4, 8, 12]])
@pytest.mark.parametrize("masked", [1, 3])
def test_a_text_in_parts_is_the_text_in_one(language_model: LanguageModel, ends: list[int], masked: int) -> None:
    with spliced(language_model, masked):
        whole = language_model.logits(TEXT)
        parts = in_parts(language_model, TEXT, ends)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert (whole - language_model.logits(TEXT)).abs().max() > 0.05


def test_a_second_turn_after_the_splice_was_opened_has_no_first_position(language_model: LanguageModel) -> None:
    clean = language_model.bridge.original_model(TEXT[:, :5], use_cache=True)
    with spliced(language_model):
        second = language_model.bridge.original_model(TEXT[:, 5:], past_key_values=clean.past_key_values).logits
    again = language_model.bridge.original_model(TEXT[:, :5], use_cache=True)
    with splice(language_model, make_dictionary(language_model, tokens=None)):  # every position
        expected = language_model.bridge.original_model(TEXT[:, 5:], past_key_values=again.past_key_values).logits
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-5)


def test_a_recurrent_model_knows_what_it_has_read(mamba: LanguageModel) -> None:
    """Its cache has no length; steps of one token continue it."""
    for ends in ([4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]):
        with spliced(mamba, 2):
            whole = mamba.logits(TEXT)
            parts = in_parts(mamba, TEXT, ends)
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    clean = mamba.bridge.original_model(TEXT[:, :5], use_cache=True)
    with seen_positions(mamba) as seen:
        mamba.bridge.original_model(TEXT[:, 5:6], cache_params=clean.cache_params)
    assert min(seen[0][0] + seen[0][1]) > 4


@pytest.mark.parametrize("ends", [[6, 12], [1, 2, 3, 12]])
def test_rwkv_s_state_is_a_cache(rwkv: LanguageModel, ends: list[int]) -> None:
    """Of one text: transformers' own mixes texts up where it reads one token of several."""
    text = TEXT[:1]
    with spliced(rwkv, 2):
        whole = rwkv.logits(text)
        parts = in_parts(rwkv, text, ends)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
    assert (whole - rwkv.logits(text)).abs().max() > 0.05


def test_a_state_of_an_earlier_time_is_beyond_the_first_positions(rwkv: LanguageModel) -> None:
    hf = rwkv.bridge.original_model
    state = hf(TEXT[:, :5], use_cache=True).state
    with seen_positions(rwkv) as seen:
        hf(TEXT[:, 5:7], state=[part.clone() for part in state])
        hf(TEXT[:, 5:7], state=[torch.zeros_like(part) for part in state[:4]] + [torch.full_like(state[4], -1e30)])
    assert seen == [[[BEYOND, BEYOND + 1]] * 2, [[0, 1]] * 2]


@pytest.mark.parametrize("family", ["mamba2", "rwkv", "mamba"])
@pytest.mark.parametrize("beams", [1, 2])
def test_padding_that_a_recurrent_model_has_read_is_not_counted(
    family: str, beams: int, request: pytest.FixtureRequest
) -> None:
    """Of these, mamba2 is not told of it again when it goes on."""
    if family == "rwkv" and beams > 1:
        pytest.skip("transformers refuses beams of it")
    model = request.getfixturevalue(family)
    mask = torch.ones_like(TEXT)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with seen_positions(model) as seen:
        model.bridge.original_model.generate(TEXT, attention_mask=mask, num_beams=beams, **options)
    for row, padding in ((0, 0), (beams, 4)):
        text = [position for places in seen for position in places[row]]
        assert text == [-1] * padding + list(range(14 - padding))


def test_padding_in_a_key_value_cache_is_not_counted_either(language_model: LanguageModel) -> None:
    """Nor without a mask for the second part; a cache that was cut is only as long as it says."""
    hf, mask = language_model.bridge.original_model, torch.ones_like(TEXT)
    mask[1, :3] = 0
    with seen_positions(language_model) as seen:
        cache = hf(TEXT[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        hf(TEXT[:, 6:8], past_key_values=cache)
        hf(TEXT[:, 8:9], past_key_values=cache, attention_mask=mask[:, :9])
        cache.crop(-4)
        hf(TEXT[:, 5:6], past_key_values=cache)
    assert [places[1] for places in seen[:3]] == [[-1, -1, -1, 0, 1, 2], [3, 4], [5]]
    assert [places[0] for places in seen[1:]] == [[6, 7], [8], [5]]


class Carrying(nn.Module):
    """A model of another kind, with memories of its own."""

    def forward(self, input_ids: Tensor, mems: Any = None, position_ids: Any = None, **others: Any) -> Tensor:
        return input_ids


@pytest.mark.parametrize("name", ["mems", "past_buckets_states", "layer_past", "recurrent_state", "cache"])
def test_a_cache_of_an_unknown_kind_is_said_to_be_unknown(name: str) -> None:
    model, place = Carrying(), torch.arange(5, 17).expand(2, 12)
    passes = Passes(model)
    with passes.watched():
        with pytest.raises(
            ModelError, match=f"continues from {name}=…, and the number of tokens .* give position_ids, or"
        ):
            model(TEXT, **{name: [torch.zeros(1)]})
        model(TEXT, position_ids=place, **{name: [torch.zeros(1)]})
        model(TEXT, use_cache=True, cache_position=place[0], encoder_hidden_states=torch.zeros(1), **{name: None})
        assert passes.now is None


def test_padding_on_the_left_is_no_first_position(language_model: LanguageModel) -> None:
    """A row with three padding tokens gives the logits of the row without them."""
    mask = torch.ones_like(TEXT)
    mask[1, :3] = 0
    with spliced(language_model):
        together = language_model.bridge(TEXT, attention_mask=mask)
        alone = language_model.logits(TEXT[1:, 3:])
    torch.testing.assert_close(together[1:, 3:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_generation_is_the_same_with_and_without_a_cache(language_model: LanguageModel, cached: bool) -> None:
    """Greedy, against one whole pass for each token."""
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with spliced(language_model, 2):
        made = language_model.bridge.generate(TEXT, use_past_kv_cache=cached, return_type="tokens", **options)
        text = TEXT
        for _ in range(6):
            text = torch.cat([text, language_model.logits(text)[:, -1:].argmax(-1)], 1)
    assert made.tolist() == text.tolist()


def test_generation_of_transformers_with_left_padding(language_model: LanguageModel) -> None:
    mask = torch.ones_like(TEXT)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with spliced(language_model, 2):
        together = language_model.bridge.original_model.generate(TEXT, attention_mask=mask, **options)
        text = TEXT[1:, 4:]
        for _ in range(5):
            text = torch.cat([text, language_model.logits(text)[:, -1:].argmax(-1)], 1)
    assert together[1, 4:].tolist() == text[0].tolist()


def test_positions_from_masks_caches_and_ids() -> None:
    cpu, mask = torch.device("cpu"), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert positions(2, 5, 0, {"attention_mask": mask}, cpu).tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, -1]]
    assert positions(2, 2, 3, {"attention_mask": mask}, cpu).tolist() == [[1, 2], [3, -1]]
    assert positions(2, 2, 3, {}, cpu).tolist() == [[3, 4], [3, 4]]
    assert positions(2, 5, 7, {"attention_mask": mask[:, :5]}, cpu).tolist()[1] == [7, 8, 9, 10, -1]
    to_the_end = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 0]])  # of a static cache
    assert positions(1, 5, 0, {"attention_mask": to_the_end}, cpu).tolist() == [[-1, -1, 0, 1, 2]]
    assert positions(1, 2, 4, {"attention_mask": to_the_end}, cpu).tolist() == [[2, 3]]
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    following = torch.tensor([2, 5])
    assert positions(2, 2, 5, {}, cpu, following).tolist() == [[2, 3], [5, 6]]
    own = {"attention_mask": mask}
    assert positions(2, 5, 5, own, cpu, following).tolist() == [[-1, -1, 2, 3, 4], [5, 6, 7, 8, -1]]
    assert positions(2, 5, 0, {"position_ids": packed}, cpu).tolist() == [[0, 1, 2, 0, 1]] * 2


def test_a_base_model_s_passes_are_known_too(language_model: LanguageModel) -> None:
    """Somebody else's head on the hidden states that the base model gives."""
    whole = language_model.bridge.original_model
    base = whole.base_model
    assert base is not whole
    with spliced(language_model, 2):
        apart = whole.lm_head(base(TEXT)[0])
        first = base(TEXT[:, :5], use_cache=True)
        second = base(TEXT[:, 5:], past_key_values=first.past_key_values)
        in_two = whole.lm_head(torch.cat([first[0], second[0]], 1))
        together = language_model.logits(TEXT)
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_two, together, rtol=1e-4, atol=1e-4)


def test_embeddings_have_positions_and_no_ids(language_model: LanguageModel) -> None:
    """First positions keep their activation there too."""
    embedded = language_model.bridge.original_model.get_input_embeddings()(TEXT)
    with spliced(language_model):
        by_embeddings = language_model.bridge.original_model(inputs_embeds=embedded).logits
        by_tokens = language_model.logits(TEXT)
    torch.testing.assert_close(by_embeddings, by_tokens, rtol=1e-5, atol=1e-5)
