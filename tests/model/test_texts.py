"""Texts become tokens, and tokens become the texts of each."""

from __future__ import annotations

import pytest
import torch

from sae.model.language_model import LanguageModel
from tests.conftest import SPECIAL


@pytest.mark.parametrize("text", ["the river keeps", "  two\n\tlines ", "naïve – 河川 😀"])
def test_the_texts_of_tokens_join_to_the_text(language_model: LanguageModel, text: str) -> None:
    tokens = language_model.to_tokens(text)
    [texts] = language_model.to_texts(tokens)
    assert texts[0] == SPECIAL and "".join(texts[1:]) == text
    assert len(texts) == tokens.shape[1]
    assert language_model.to_texts(tokens[0]) == language_model.to_texts(tokens[0].tolist()) == texts
    assert language_model.to_texts(tokens.repeat(2, 1)) == [texts, texts]
    assert language_model.to_texts([]) == []


def test_one_hook_point_needs_no_list(language_model: LanguageModel) -> None:
    tokens, hook = language_model.to_tokens("the river"), "blocks.1.hook_resid_pre"
    alone, listed = (language_model.activations(tokens, hooks) for hooks in (hook, [hook]))
    assert list(alone) == [hook] and torch.equal(alone[hook], listed[hook])
