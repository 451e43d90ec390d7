"""What the tests of attribution share: models in float64, random dictionaries, and attributions the slow way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.architectures import ReLU, TopK
from sae.config.sources import ModelConfig
from sae.dictionary.base import Dictionary
from sae.effects import Attribution
from sae.model.language_model import LanguageModel
from sae.model.splicing import splice

RESID, POST, MLP = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"
BEFORE_MLP = "blocks.1.hook_resid_mid"


def in_float64(folder: Path) -> LanguageModel:
    """A model that computes in float64."""
    model = LanguageModel(ModelConfig(name=str(folder)))
    model.bridge.original_model.double()
    return model


def make_dictionary(
    language_model: LanguageModel, hook: str | None = RESID, kind: type[Dictionary] = TopK, seed: int = 2,
    **metadata: Any,
) -> Dictionary:  # fmt: skip
    """A random dictionary in float64 of the model's width."""
    policy = language_model.token_policy(prepend_bos=True, masked_positions=1, mask_special_tokens=True)
    known = {"hook": hook, "model": language_model.info.to_json(), "tokens": policy.to_json(), **metadata}
    dictionary = kind(language_model.info.d_model, 48, metadata=known, **({"k": 4} if kind is TopK else {})).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in dictionary.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return dictionary


def make_tokens(model: LanguageModel, contexts: int = 2, length: int = 9) -> Tensor:
    """Random ids; the first of each context is BOS, and one in the middle of the last context."""
    tokens = torch.randint(1, 300, (contexts, length), generator=torch.Generator().manual_seed(1))
    assert model.bos is not None
    tokens[:, 0] = tokens[-1, 4] = model.bos
    return tokens


def masked(model: LanguageModel, tokens: Tensor) -> Tensor:
    """The tokens that are masked: first positions and BOS."""
    return (tokens == model.bos) | (torch.arange(tokens.shape[1]) == 0)


def dense(attribution: Attribution, d_sae: int) -> Tensor:
    """The attributions of a single dictionary as `[context, seq, d_sae]`, without those to the error."""
    contexts, length = attribution.tokens.shape
    table = torch.zeros(contexts, length, d_sae, dtype=torch.float64)
    of_features = attribution.feature >= 0
    index = tuple(
        torch.from_numpy(column[of_features])
        for column in (attribution.context, attribution.position, attribution.feature)
    )
    return table.index_put_(index, torch.from_numpy(attribution.attribution[of_features]), accumulate=True)


def function_of_features(
    model: LanguageModel, dictionary: Dictionary, tokens: Tensor, of: Callable[[Tensor], Tensor],
    change: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """The function of the logits with the features changed and the error held, by splicing."""
    with splice(model, dictionary, error_term=True, edit=change):
        return of(model.bridge(tokens)).sum()


def by_autograd(
    model: LanguageModel, dictionary: Dictionary, tokens: Tensor, of: Callable[[Tensor], Tensor],
    shares: Sequence[float],
) -> Tensor:  # fmt: skip
    """f times the mean over shares α of ∂m/∂f at α f, `[context, seq, d_sae]`, from dense features."""
    mean: Tensor | float = 0.0
    leaves: list[Tensor] = []

    for share in shares:
        leaves.clear()

        def at_share(features: Tensor, share: float = share) -> Tensor:
            leaves[:] = [features.detach(), (share * features).detach().requires_grad_()]
            return leaves[1]

        value = function_of_features(model, dictionary, tokens, of, at_share)
        mean = mean + torch.autograd.grad(value, leaves[1])[0] / len(shares)
    return leaves[0] * mean


def relu_dictionary(model: LanguageModel, **options: Any) -> Dictionary:
    """A dictionary of which about half of the features fire."""
    return make_dictionary(model, kind=ReLU, **options)
