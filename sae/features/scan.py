"""The pass over a cache that encodes every eligible token once, and yields what fires in a few contexts at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from sae.activations.cache import ActivationCache, ContextBatch
from sae.config.progress import StageProgress
from sae.dictionary.base import Dictionary

_ENCODED_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Fired:
    """The firings in a few contexts, in the order of their rows.

    Attributes:
        batch: the contexts.
        tokens: number of eligible tokens in them.
        feature: the feature that fired.
        offset: its row in the batch.
        value: the activation, > 0.
    """

    batch: ContextBatch
    tokens: int
    feature: Int[np.ndarray, " firings"]
    offset: Int[np.ndarray, " firings"]
    value: Float[np.ndarray, " firings"]


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
        batch_contexts: number of contexts encoded at once; None: about 2²⁶ / d_sae tokens.
        progress: called with the number of tokens done and the total.
    """
    total = min(cache.rows(split), tokens or cache.rows(split))
    at_once = batch_contexts or max(1, _ENCODED_AT_ONCE // (dictionary.d_sae * cache.context_length))
    if progress is not None:
        progress(0, total)
    for batch in cache.contexts(split, hook, batch_contexts=at_once, max_tokens=tokens):
        assert batch.activations is not None
        x = batch.activations[batch.eligible].to(dictionary.W_enc.device)
        with torch.no_grad():
            codes = dictionary.encode_sparse(x)
        values, indices = codes.values.float().cpu().numpy(), codes.indices.int().cpu().numpy()
        fires = values > 0
        offset = np.repeat(np.flatnonzero(batch.eligible.numpy()), fires.sum(1))
        yield Fired(batch, len(x), indices[fires], offset, values[fires])
        if progress is not None:
            progress(batch.first_row + batch.tokens.numel(), total)
