from __future__ import annotations

from typing import Any

import pytest
import torch
from causal_case import HEADS, MLP, POST, RESID
from torch import Tensor

from sae.causal.continuation import Continuation
from sae.errors import ModelError
from sae.language_model import LanguageModel

POSITIONS = torch.tensor([[0, 3, 9], [1, 1, 11], [10, 4, 2]])


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 300, (3, 12), generator=torch.Generator().manual_seed(3))


def picked(logits: Tensor) -> Tensor:
    return torch.stack([row[places] for row, places in zip(logits, POSITIONS, strict=True)])


@pytest.mark.parametrize("hook", [RESID, "blocks.2.hook_resid_pre", "blocks.0.hook_resid_pre", POST, MLP, HEADS])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite"])
def test_logits_are_those_of_the_whole_model_with_the_activations_replaced(
    language_model: LanguageModel, gemma: LanguageModel, granite: LanguageModel, tokens: Tensor, hook: str, family: str
) -> None:
    model = {"gpt2": language_model, "gemma2": gemma, "granite": granite}[family]
    continuation = Continuation(model, hook)
    x = continuation.activations(tokens)
    for new in (x, 0.5 * x.flip(-1) + 0.1):
        expected = next(model.replaced_logits(tokens, hook, [lambda _, new=new: new]))
        readout = continuation(tokens, new, POSITIONS)
        torch.testing.assert_close(readout.logits, picked(expected), rtol=1e-4, atol=1e-4)
    assert (picked(expected) - picked(model.logits(tokens))).abs().max() > 0.05
    last = f"blocks.{model.info.n_layers - 1}.hook_resid_post"
    final = continuation(tokens, x, POSITIONS).final
    torch.testing.assert_close(final, picked(model.activations(tokens, [last])[last]), rtol=1e-4, atol=1e-4)


def test_contexts_can_be_repeated_and_cut_short(language_model: LanguageModel, tokens: Tensor) -> None:
    continuation = Continuation(language_model, RESID)
    x = continuation.activations(tokens)
    which = torch.tensor([2, 0, 0, 1])
    readout = continuation(tokens[which, :8], x[which, :8], torch.full((4, 1), 7))
    torch.testing.assert_close(readout.logits[:, 0], language_model.logits(tokens)[which, 7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hook", [RESID, MLP])
def test_the_model_is_left_as_it_was(language_model: LanguageModel, tokens: Tensor, hook: str) -> None:
    before = language_model.logits(tokens)
    continuation = Continuation(language_model, hook)
    x = continuation.activations(tokens)
    continuation(tokens, torch.zeros_like(x), POSITIONS)
    with pytest.raises(RuntimeError):
        continuation(tokens, torch.zeros_like(x), POSITIONS + 12)  # no such position
    torch.testing.assert_close(language_model.logits(tokens), before, rtol=0, atol=0)
    assert language_model.logits(tokens).shape == (3, 12, before.shape[-1])


def test_blocks_before_the_hook_point_do_not_run(language_model: LanguageModel, tokens: Tensor) -> None:
    ran: list[int] = []

    def note(number: int) -> Any:
        return lambda *_: ran.append(number)

    blocks = language_model.bridge.original_model.transformer.h
    handles = [block.ln_1.register_forward_pre_hook(note(number)) for number, block in enumerate(blocks)]
    try:
        continuation = Continuation(language_model, "blocks.2.hook_resid_pre")
        x = continuation.activations(tokens)
        continuation(tokens, x, POSITIONS)  # the first time it also looks at what blocks give
        ran.clear()
        continuation(tokens, x, POSITIONS)
        assert ran == [2]
        ran.clear()
        language_model.logits(tokens)
        assert ran == [0, 1, 2]
    finally:
        for handle in handles:
            handle.remove()


def test_a_hook_point_that_cannot_be_replaced(language_model: LanguageModel) -> None:
    with pytest.raises(ModelError, match="can read hook_resid_mid but not replace it"):
        Continuation(language_model, "blocks.1.hook_resid_mid")
