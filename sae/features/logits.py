"""The next tokens a feature makes more and less likely: its decoder direction through the unembedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PRODUCTS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class LogitEffects:
    """The tokens a feature raises and lowers most, strongest effect first, per unit of activation.

    Effects are correct up to a positive factor, because the final norm's division by the token's norm is left out.
    """

    promoted: Int[Tensor, "d_sae n"]
    promoted_logits: Float[Tensor, "d_sae n"]
    suppressed: Int[Tensor, "d_sae n"]
    suppressed_logits: Float[Tensor, "d_sae n"]


def logit_effects(W_dec: Float[Tensor, "d_sae d_in"], W_U: Float[Tensor, "d_in vocab"], n: int) -> LogitEffects:
    """The largest and smallest entries of each row of W_dec W_U, computed some features at a time."""
    n = min(n, W_U.shape[1])
    W_U = W_U.to(W_dec.device, torch.float32)
    rows = max(1, _PRODUCTS_AT_ONCE // W_U.shape[1])
    parts = []
    for chunk in W_dec.float().split(rows):
        effects = chunk @ W_U
        high, low = effects.topk(n, dim=1), effects.topk(n, dim=1, largest=False)
        parts.append((high.indices, high.values, low.indices, low.values))
    return LogitEffects(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
