"""What cannot be attributed is refused with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sae
from sae.effects import NextToken
from sae.errors import ConfigError, ModelError, SaeError
from sae.model.language_model import LanguageModel
from tests.support.attribution_case import MLP, RESID, make_dictionary

TEXT = "The river keeps a stone"


def refusal(model: LanguageModel, kind: type[SaeError] = ConfigError, text: Any = TEXT, **options: Any) -> str:
    dictionary = options.pop("dictionary", None) or make_dictionary(model)
    with pytest.raises(kind) as caught:
        sae.attribute(dictionary, model, text, **options)
    return str(caught.value)


def test_numbers_to_attribute(language_model: LanguageModel) -> None:
    length = len(language_model.to_tokens(TEXT)[0])
    expected = f"position={length}: the text has {length} tokens, BOS included; give {-length} to {length - 1}"
    assert refusal(language_model, of=NextToken(7, position=length)) == expected
    assert "position=-99" in refusal(language_model, of=NextToken(7, position=-99))
    message = refusal(language_model, of="The river")
    assert "token 'The river': " in message and " tokens (" in message and "give the text of a single one" in message
    assert "reads it as 0 tokens; give" in refusal(language_model, of="")
    assert refusal(language_model, of=NextToken(5, minus=100_000)).startswith("token 100000: ")
    assert "has tokens 0 to" in refusal(language_model, of=NextToken(-1))
    with pytest.raises(ConfigError, match=r"minus=' a' with log_probability: .* leave out one of them"):
        NextToken(" the", minus=" a", log_probability=True)


def test_functions(language_model: LanguageModel) -> None:
    message = refusal(language_model, of=lambda logits: logits[:, -1])
    assert message.startswith("of: the function of the logits [1, ") and "return one number" in message
    assert "returned float;" in refusal(language_model, of=lambda logits: float(logits.sum()))
    assert "torch.int64" in refusal(language_model, of=lambda logits: logits[:, -1].argmax(-1))
    assert "has no gradient" in refusal(language_model, of=lambda logits: logits[:, -1, 3].detach())


def test_settings(language_model: LanguageModel) -> None:
    assert refusal(language_model, method="shap") == (
        "method='shap': expected gradient_activation or integrated_gradients"
    )
    assert refusal(language_model, steps=0) == "steps=0: expected 1 to 1,000"
    assert refusal(language_model, groups=1001) == "groups=1001: expected 1 to 1,000"
    refused = refusal(language_model, groups=2, method="gradient_activation")
    assert refused == "groups=2: gradient_activation has no path; leave groups out, or choose another method"
    with pytest.raises(ConfigError, match="the list is empty"):
        sae.attribute([], language_model, TEXT)


def test_texts(language_model: LanguageModel) -> None:
    assert refusal(language_model, text=torch.tensor([[language_model.bos]])).startswith("text: all 1 tokens are among")
    message = refusal(language_model, ModelError, text=torch.ones(1, 65, dtype=torch.int64))
    assert message.startswith("text: 65 tokens, and ") and message.endswith("reads at most 64")
    assert "there are no tokens" in refusal(language_model, ModelError, text=torch.zeros(1, 0, dtype=torch.int64))
    policy = language_model.token_policy(prepend_bos=False, masked_positions=1, mask_special_tokens=True)
    differing = [make_dictionary(language_model), make_dictionary(language_model, MLP, tokens=policy.to_json())]
    message = refusal(language_model, dictionary=differing)
    assert message.startswith("text: some of the dictionaries") and "pass ids" in message
    tokens = language_model.to_tokens(TEXT)
    assert len(sae.attribute(differing, language_model, tokens, steps=1).dictionaries) == 2


def test_dictionaries(language_model: LanguageModel) -> None:
    other = make_dictionary(language_model, model={**language_model.info.to_json(), "weights_sha256": "0" * 64})
    assert "not the dictionary's model" in refusal(language_model, ModelError, dictionary=other)
    unknown = make_dictionary(language_model, hook=None)
    assert "does not record its hook point" in refusal(language_model, ModelError, dictionary=unknown)
    middle = make_dictionary(language_model, "blocks.1.hook_resid_mid")
    assert "hook_resid_mid" in refusal(language_model, ModelError, dictionary=middle)
    wide = make_dictionary(language_model, "blocks.1.mlp.hook_post")
    assert "activations are 128 wide, the dictionary takes 32" in refusal(language_model, ModelError, dictionary=wide)
    assert make_dictionary(language_model).origin.reads.hook == RESID


def test_tokens_by_text(language_model: LanguageModel) -> None:
    """The text of a token finds its id, in the tokenizer's own reading."""
    for token in (5, 260, 300):
        text = language_model.to_texts([token])[0]
        ids = language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            continue
        by_text = sae.attribute(make_dictionary(language_model), language_model, TEXT, of=text, steps=1)
        by_id = sae.attribute(make_dictionary(language_model), language_model, TEXT, of=NextToken(token), steps=1)
        assert by_text.value == by_id.value
        assert by_text.of == f"logit of {text!r} after position {by_text.tokens.shape[1] - 1}"
