"""The pass over a cache that encodes every eligible token once, and yields what fires in a few contexts at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.cache import ActivationCache, ContextBatch, uploaded
from sae.config.progress import StageProgress
from sae.dictionary.base import Dictionary
from sae.features.ordering import places_of

_ENCODED_AT_ONCE, _TOKENS_AT_ONCE, _TIMES_ON_GPU = 1 << 26, 4096, 2


@dataclass(frozen=True)
class Fired:
    """The firings in a few contexts, on the dictionary's device, in the order of their rows.

    Attributes:
        batch: the contexts; its activations are on that device, the rest on the CPU.
        offset: row in the batch of each eligible token.
        token: the eligible token on which the feature may have fired, an index into `offset`.
        feature: the feature; it occurs at most once a token.
        value: the activation, float32. The feature fired if it is > 0.
    """

    batch: ContextBatch
    offset: Int[Tensor, " tokens"]
    token: Int[Tensor, " firings"]
    feature: Int[Tensor, " firings"]
    value: Float[Tensor, " firings"]

    @property
    def tokens(self) -> int:
        """Number of eligible tokens."""
        return len(self.offset)

    def on_host(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Feature, row in the batch and activation of each firing, as arrays."""
        fires = places_of(self.value > 0)
        columns = self.feature[fires], self.offset[self.token[fires]], self.value[fires]
        feature, offset, value = (column.cpu().numpy() for column in columns)
        return feature, offset, value


def scan_contexts(
    dictionary: Dictionary,
    cache: ActivationCache,
    split: str,
    hook: str,
    *,
    tokens: int | None = None,
    batch_contexts: int | None = None,
    progress: StageProgress | None = None,
) -> Iterator[Fired]:
    """Encode a split's eligible tokens on the dictionary's device.

    Args:
        dictionary: takes raw activations.
        cache: holds them.
        split: the split that is read.
        hook: hook point.
        tokens: number of tokens to read, in whole contexts; None: all.
        batch_contexts: number of contexts encoded at once; None: about 2²⁶ / d_sae tokens, at most 4,096; twice as many
            on a GPU.
        progress: called with the number of tokens done and the total.
    """
    total, device = min(cache.rows(split), tokens or cache.rows(split)), dictionary.device
    most = min(_ENCODED_AT_ONCE // dictionary.d_sae, _TOKENS_AT_ONCE)
    most *= 1 if device.type == "cpu" else _TIMES_ON_GPU
    at_once = batch_contexts or max(1, most // cache.context_length)
    if progress is not None:
        progress(0, total)
    for batch in cache.contexts(split, hook, batch_contexts=at_once, max_tokens=tokens, device=device):
        assert batch.activations is not None
        offset = uploaded(places_of(batch.eligible.flatten()), device)
        with torch.no_grad():
            token, feature, value = dictionary.encode_pairs(batch.activations.flatten(0, 1).index_select(0, offset))
        yield Fired(batch, offset, token, feature, value.float())
        if progress is not None:
            progress(batch.first_row + batch.tokens.numel(), total)
