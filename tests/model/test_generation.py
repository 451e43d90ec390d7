"""Generation, of several prompts together, against one whole pass for each token."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_model

from sae.errors import ConfigError, ModelError
from sae.model.language_model import LanguageModel
from sae.model.splicing import splice
from tests.model.test_routes import dictionaries

PROMPTS = [
    "import os",
    "def f(x):\n    return x",
    "class A(Base): pass  # a longer one, so that others are padded",
    "x",
]
FAMILIES = ["gpt2", "llama", "gemma2", "qwen3", "bloom"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    settings = {"max_position_embeddings": 128, "vocab_size": 4096}
    folder = write_model(request.param, tmp_path_factory.mktemp(request.param) / request.param, **settings)
    return LanguageModel(str(folder))


@torch.no_grad()
def token_by_token(model: LanguageModel, prompt: str, count: int) -> list[int]:
    """Greedy, without cache, batch or padding, through the bridge."""
    tokens = model.to_tokens(prompt)
    length = tokens.shape[1]
    for _ in range(count):
        tokens = torch.cat([tokens, model.logits(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0, length:].tolist()


@pytest.mark.parametrize("spliced", [False, True])
def test_prompts_of_several_lengths_are_continued_as_each_alone(model: LanguageModel, spliced: bool) -> None:
    block: Any = splice(model, dictionaries(model)[:2]) if spliced else contextlib.nullcontext()
    with block:
        together = model.generate(PROMPTS, max_new_tokens=6, stop=False)
        alone = [token_by_token(model, prompt, 6) for prompt in PROMPTS]
    assert [made.tokens for made in together] == alone
    assert [made.text for made in together] == ["".join(model.to_texts(made.tokens)) for made in together]


def test_the_settings_that_come_with_a_model_are_left_out_and_put_back(model: LanguageModel) -> None:
    from transformers import GenerationConfig

    expected = model.generate(PROMPTS, max_new_tokens=6, stop=False)
    hf = model.hf_model
    own, hf.generation_config = hf.generation_config, GenerationConfig(do_sample=True, repetition_penalty=5.0)
    settings = hf.generation_config
    try:
        assert model.generate(PROMPTS, max_new_tokens=6, stop=False) == expected
        assert hf.generation_config is settings
    finally:
        hf.generation_config = own


def test_a_seed_samples_from_the_whole_distribution(language_model: LanguageModel) -> None:
    """2,000 next tokens of one prompt have the frequencies of the softmax."""
    prompts, state = ["the river"] * 2000, torch.random.get_rng_state()
    made = language_model.generate(prompts, max_new_tokens=1, seed=3, temperature=2.0, stop=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = language_model.generate(prompts, max_new_tokens=1, seed=3, temperature=2.0, stop=False)
    assert made == again != language_model.generate(prompts, max_new_tokens=1, seed=4, temperature=2.0, stop=False)
    p = (language_model.logits(language_model.to_tokens("the river"))[0, -1] / 2).softmax(-1)
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in made]), minlength=len(p))
    assert float((counts / 2000 - p).abs().sum()) < 2 * float((p / 2000).sqrt().sum())


def test_a_continuation_ends_where_the_text_does(language_model: LanguageModel) -> None:
    """A text that ends is cut, while others go on."""
    end = language_model.tokenizer.eos_token_id
    prompts = ["the river", "a stone"]
    whole = language_model.generate(prompts, max_new_tokens=12, seed=1, stop=False)
    hf = language_model.hf_model
    own = hf.generation_config.eos_token_id
    ending = whole[0].tokens[3]
    hf.generation_config.eos_token_id = [end, ending]
    try:
        cut = language_model.generate(prompts, max_new_tokens=12, seed=1)
    finally:
        hf.generation_config.eos_token_id = own
    for made, all_of_it in zip(cut, whole, strict=True):
        ends = [place for place, token in enumerate(all_of_it.tokens) if token in (end, ending)]
        expected = all_of_it.tokens[: ends[0]] if ends else all_of_it.tokens
        assert made.tokens == expected[: len(made.tokens)]
    assert cut[0].tokens == whole[0].tokens[: whole[0].tokens.index(ending)]


def test_what_cannot_be_generated_is_refused(language_model: LanguageModel) -> None:
    for settings, error, message in (
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens=0: expected at least 1"),
        ({"temperature": 0.0}, ConfigError, "temperature=0.0: expected more than 0"),
        ({"max_new_tokens": 63}, ModelError, "are 6. tokens together: tiny reads at most 64; shorten the prompt"),
    ):
        with pytest.raises(error, match=message):
            language_model.generate("the river", **settings)
    with pytest.raises(ModelError, match="there is no text, or a text has no tokens: leave out empty texts"):
        language_model.generate([])
    with pytest.raises(ModelError, match="or a text has no tokens: leave out"):
        language_model.generate(["a", ""], prepend_bos=False)
    assert language_model.prompt_lengths is None


def test_without_transformer_lens_it_generates_the_same(
    tiny_model: Path, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    expected = language_model.generate(["the river", "a"], max_new_tokens=5)
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    bare = LanguageModel(str(tiny_model))
    assert not bare.has_bridge
    assert bare.generate(["the river", "a"], max_new_tokens=5) == expected
