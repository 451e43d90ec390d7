"""First-order effects against autograd through Hugging Face's own final norm, unembedding and softmax."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae.effects.direct import DirectPath
from sae.model.language_model import LanguageModel
from tests.support.effect_case import HEADS, MLP, POST, RESID, make_gemma, make_granite


def rows(seed: int, width: int) -> Tensor:
    return torch.randn(9, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_log_probabilities_change_by_the_gradient(
    language_model: LanguageModel, gemma: LanguageModel, family: str
) -> None:
    model = language_model if family == "gpt2" else gemma
    hf = model.bridge.original_model
    norm = hf.transformer.ln_f if family == "gpt2" else hf.model.norm
    width = model.info.d_model
    final, change = 3 * rows(0, width) + 1, rows(1, width)
    token = torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(2))

    leaf = final.clone().requires_grad_()
    log_p = hf.lm_head(norm(leaf)).log_softmax(-1)
    chosen = log_p.gather(1, token[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(chosen.sum(), leaf)
    expected = (gradient * change).sum(-1).double()

    path = DirectPath.of(model, RESID)
    assert path is not None
    assert path.centres == (family == "gpt2")
    normed = path.through_norm(final, change)
    found = path.log_probability(normed, log_p.detach(), token)
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(found.log_probability, expected, rtol=1e-3, atol=1e-5)

    # Every other token's log-probability differs in its logit alone: all of them weighted by p sum to 0.
    every = (normed @ path.W_U).double() - found.mean_logit[:, None]
    torch.testing.assert_close(
        (log_p.detach().double().exp() * every).sum(-1), torch.zeros(9).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(every.gather(1, token[:, None])[:, 0], expected, rtol=1e-3, atol=1e-5)


def test_a_change_along_the_normed_residual_does_nothing(language_model: LanguageModel) -> None:
    """The norm takes lengths away, up to its ε: what is longer in its own direction gives the same logits."""
    path = DirectPath.of(language_model, RESID)
    assert path is not None
    final = 5 * rows(4, 32)
    centred = final - final.mean(-1, keepdim=True)
    assert path.through_norm(final, centred).abs().max() < 1e-4
    assert path.through_norm(final, torch.ones(9, 32)).abs().max() < 1e-6
    assert path.through_norm(final, rows(5, 32)).abs().max() > 0.1


def test_where_there_is_no_direct_path(language_model: LanguageModel, tiny_model: Path, tmp_path: Path) -> None:
    assert DirectPath.of(language_model, HEADS) is None
    assert DirectPath.of(language_model, MLP) is not None and DirectPath.of(language_model, POST) is not None
    capped = make_gemma(tmp_path / "capped", tiny_model, cap=30.0)
    assert DirectPath.of(capped, RESID) is None, "tanh of the logits comes after the unembedding"


def test_scaled_logits_have_no_direct_path(granite: LanguageModel, tiny_model: Path, tmp_path: Path) -> None:
    """Granite divides them, after the unembedding, by a number of its configuration."""
    assert DirectPath.of(granite, RESID) is not None
    assert DirectPath.of(make_granite(tmp_path / "scaled", tiny_model, logits_scaling=16.0), RESID) is None
