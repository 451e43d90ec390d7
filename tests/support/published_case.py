"""Tensors that other packages' evaluations are run on, here and by `scripts/legacy_reference.py`. Needs torch alone.

A causal toy model without weights to download: activations are a function of a token, the one before it and the
position; logits are a linear function of the mean of the activations so far. Token 0 opens every context, stands inside
some, and has activations twenty times as large.
"""

from __future__ import annotations

import torch
from torch import Tensor

HOOK = "blocks.1.hook_resid_pre"
CONTEXTS, SEQ, VOCAB, D_IN, D_SAE, SPECIAL = 40, 12, 20, 8, 24, 0
_generator = torch.Generator().manual_seed(5)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator)


TOKENS = torch.randint(0, VOCAB, (CONTEXTS, SEQ), generator=_generator)
TOKENS[:, 0] = SPECIAL
_EMBED, _BEFORE, _POSITION = _normal(VOCAB, D_IN), _normal(VOCAB, D_IN), _normal(SEQ, D_IN)
_UNEMBED = 0.05 * _normal(D_IN, VOCAB)  # SAEBench's divergence is not a number where a probability underflows
_V = torch.nn.functional.normalize(_normal(D_SAE, D_IN), dim=-1)
_b, _c = 1.5 + 0.2 * _normal(D_IN), 0.3 * _normal(D_SAE) - 0.5


def residual(tokens: Tensor) -> Tensor:
    """Activations `[context, seq, d_in]` of tokens `[context, seq]`."""
    before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
    x = 1.5 + _EMBED[tokens] + 0.5 * _BEFORE[before] + 0.3 * _POSITION[: tokens.shape[1]]
    return torch.where((tokens == SPECIAL)[..., None], 20 * x, x)


def logits(x: Tensor) -> Tensor:
    """Next-token logits `[context, seq, vocab]` of activations."""
    count = torch.arange(1, x.shape[1] + 1)[:, None]
    return x.cumsum(1) / count @ _UNEMBED


def encode(x: Tensor) -> Tensor:
    """Features `[..., d_sae]`."""
    return ((x - _b) @ _V.T + _c).relu()


def decode(features: Tensor) -> Tensor:
    """Reconstructions `[..., d_in]`."""
    return 0.4 * features @ _V + _b


def mean() -> Tensor:
    """Mean activation of the tokens that are not special."""
    return residual(TOKENS)[TOKENS != SPECIAL].double().mean(0).float()
