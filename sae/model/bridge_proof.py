"""Checks that a bridged model is still the same model, by its log-probabilities on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.model.hook_probe import probe_tokens

_LENGTH = 32
_TOLERANCE = 1e-3
_ROUNDING_STEPS = 100
_SHARE_OF_POSITIONS = 7 / 8


@dataclass(frozen=True)
class Difference:
    """How far a bridged model's log-probabilities are from the model's own.

    Attributes:
        largest: largest difference between log-probabilities, in nats.
        share: difference as a share of the bound; above 1, it is another model.
    """

    largest: float
    share: float


class BridgeProof:
    """A model's logits for some tokens, taken before transformer-lens changes the model.

    In float32, log-probabilities may differ by 1e-3, or by 100 rounding steps of the largest logit if that is more. The
    router of a mixture of experts may break a near tie the other way at an eighth of the positions. In float16 and
    bfloat16 such ties are frequent, so the median position counts: the root mean square of its differences may be
    2 √(1 + blocks) rounding steps of that of its logits, since every block rounds separately.

    Args:
        model: a Hugging Face model on its device, in evaluation mode.
        vocabulary: number of token ids.

    Raises:
        Exception: whatever the model's forward pass raises.
    """

    @torch.no_grad()
    def __init__(self, model: Any, vocabulary: int) -> None:
        length = min(_LENGTH, getattr(model.config, "max_position_embeddings", None) or _LENGTH)
        self._tokens = probe_tokens(max(1, vocabulary), 1, length, model.device)
        logits = getattr(model(self._tokens), "logits", None)
        self._expected: Float[Tensor, "seq vocab"] | None = None if logits is None else logits[0].float()
        coarse = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
        self._eps = 2**-10 if coarse and model.dtype == torch.float32 else torch.finfo(model.dtype).eps

    @torch.no_grad()
    def difference(self, bridge: Any) -> Difference:
        """Compare a bridge's logits with the model's. The difference is 0 if the model gives no logits.

        Raises:
            Exception: whatever the bridge's forward pass raises.
        """
        logits = bridge(self._tokens)[0].float()
        if self._expected is None:
            return Difference(0.0, 0.0)
        if logits.shape != self._expected.shape:
            return Difference(float("inf"), float("inf"))
        differences = _apart(logits.log_softmax(-1), self._expected.log_softmax(-1))
        if self._eps < 1e-6:
            bound = max(_TOLERANCE, _ROUNDING_STEPS * self._eps * float(self._expected.nan_to_num().abs().max()))
            share = _ranked(differences.amax(-1), _SHARE_OF_POSITIONS) / bound
        else:
            scale = _root_mean_square(self._expected.nan_to_num(0.0, 0.0, 0.0)).clamp_min(1e-30)
            bound = self._eps * 2 * (1 + bridge.cfg.n_layers) ** 0.5
            share = _ranked(_root_mean_square(differences) / scale, 1 / 2) / bound
        return Difference(float(differences.max()), share)


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """|first − second|; infinities and NaNs are equal to themselves and infinitely far from the rest."""
    same = (first == second) | (first.isnan() & second.isnan())
    return (first - second).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0.0)


def _root_mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1).sqrt()


def _ranked(values: Tensor, share: float) -> float:
    """The value that a share of the values does not exceed."""
    return float(values.sort().values[min(int(share * len(values)), len(values) - 1)])
