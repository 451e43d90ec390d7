"""Where features fire in held-out text: how often, how strongly, and a seeded sample of the places."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae.activations.cache import ActivationCache, ContextBatch
from sae.config.progress import StageProgress
from sae.config.splits import HELD_OUT
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError
from sae.features.block import Block
from sae.features.collection import random_keys

_ENCODED_AT_ONCE = 1 << 26
_KEPT_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Places:
    """Firings, feature by feature, each feature's in the order in which they are drawn."""

    feature: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]

    def rows_of(self, feature: int) -> Int[np.ndarray, " n"]:
        """Rows of the held-out split, those drawn first at the front."""
        start, end = np.searchsorted(self.feature, [feature, feature + 1])
        return self.row[start:end]


@dataclass(frozen=True)
class Firings:
    """What one pass over held-out activations finds.

    Attributes:
        tokens: eligible tokens read.
        count: of them, those that each feature fires on.
        mean: mean of each feature's activations there; 0 where it never fires.
        places: of each feature some firings that can be measured: those with a next token in their context.
        rows: all rows that can be measured.
        documents: the document of every row read, an index into the cache's held-out documents.
    """

    tokens: int
    count: Int[np.ndarray, " d_sae"]
    mean: Float[np.ndarray, " d_sae"]
    places: Places
    rows: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " rows"]

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Share of the eligible tokens that each feature fires on."""
        return self.count / max(1, self.tokens)


@torch.no_grad()
def scan_firings(
    dictionary: Dictionary,
    cache: ActivationCache,
    hook: str,
    *,
    positions: int,
    seed: int,
    tokens: int | None = None,
    features: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    progress: StageProgress | None = None,
) -> Firings:
    """Encode held-out activations once, and keep of every feature at most `positions` places where it fires.

    Args:
        dictionary: takes raw activations.
        cache: its held-out split is read.
        hook: hook point.
        positions: most places kept of a feature; see `spread`.
        seed: of the draw. A firing's chance depends on it, on the feature and on the row alone.
        tokens: held-out tokens read, in whole contexts; None: all.
        features: those whose places are kept; None: all.
        device: where tokens are encoded.
        progress: called with tokens done and tokens in all.

    Raises:
        ConfigError: `tokens` is less than one context, or no row can be measured.
    """
    if dictionary.W_dec.device != torch.empty(0, device=device).device:
        dictionary = copy.deepcopy(dictionary).to(device)
    found = _Found(dictionary.d_sae, positions, seed, features)
    of = min(cache.rows(HELD_OUT), tokens or cache.rows(HELD_OUT))
    at_once = max(1, _ENCODED_AT_ONCE // (dictionary.d_sae * cache.context_length))
    if progress is not None:
        progress(0, of)
    for batch in cache.contexts(HELD_OUT, hook, batch_contexts=at_once, max_tokens=tokens):
        assert batch.activations is not None
        values, indices = dictionary.encode_sparse(batch.activations[batch.eligible].to(device))
        found.add_(batch, values.float().cpu().numpy(), indices.cpu().numpy())
        if progress is not None:
            progress(batch.first_row + batch.tokens.numel(), of)
    if not sum(map(len, found.rows)):
        read = "all held-out tokens" if tokens is None else f"the first {tokens:,} held-out tokens"
        raise ConfigError(
            f"effects: in {read} the token policy leaves none with a next token in its context; read at least one "
            f"context ({cache.context_length} tokens)"
        )
    return found.firings()


def measurable(eligible: Bool[torch.Tensor, "context seq"]) -> Bool[torch.Tensor, "context seq"]:
    """Positions whose loss counts: eligible ones with a next token in their context."""
    counted = eligible.clone()
    counted[:, -1] = False
    return counted


def spread(
    feature: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"], document: Int[np.ndarray, " n"], seed: int, most: int
) -> Int[np.ndarray, " kept"]:
    """Indices of at most `most` firings of every feature, in random order, documents taking turns.

    Each document gives one before any gives a second, so that no long one crowds the others out. What is kept of parts
    of the firings, and then of those parts together, is what is kept of all at once.
    """
    blank = np.zeros(len(row), dtype=np.float32)
    key = random_keys(Block(feature, row, blank, document, row), "effects: places", seed)
    order = np.lexsort((row, key, document, feature))
    turn = _place_in_run(feature[order], document[order])
    order = order[np.lexsort((row[order], key[order], turn, feature[order]))]
    return order[_place_in_run(feature[order]) < most]


def _place_in_run(*columns: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """0, 1, 2, … within each run of equal entries."""
    place = np.arange(len(columns[0]))
    begins = np.zeros(len(place), dtype=bool)
    begins[:1] = True
    for column in columns:
        begins[1:] |= column[1:] != column[:-1]
    return place - np.maximum.accumulate(np.where(begins, place, 0))


class _Found:
    """Running counts, and the firings kept so far."""

    def __init__(self, d_sae: int, positions: int, seed: int, features: Sequence[int] | None) -> None:
        self.positions, self.seed, self.tokens = positions, seed, 0
        self.wanted = np.ones(d_sae, dtype=bool) if features is None else np.isin(np.arange(d_sae), features)
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.sum = np.zeros(d_sae, dtype=np.float64)
        self.rows: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []
        self.waiting: list[Places] = []

    def add_(self, batch: ContextBatch, values: np.ndarray, indices: np.ndarray) -> None:
        """Take in the codes `[t, k]` of a batch's eligible rows."""
        eligible, documents = batch.eligible.flatten().numpy(), batch.documents.flatten().numpy()
        counts = measurable(batch.eligible).flatten().numpy()
        offsets = np.flatnonzero(eligible)
        fires = values > 0
        offset = np.repeat(offsets, fires.sum(1))
        feature = indices[fires].astype(np.int64)
        self.tokens += len(offsets)
        self.count += np.bincount(feature, minlength=len(self.count))
        self.sum += np.bincount(feature, weights=values[fires], minlength=len(self.sum))
        self.rows.append(batch.first_row + np.flatnonzero(counts))
        self.documents.append(documents)
        chosen = counts[offset] & self.wanted[feature]
        feature, offset = feature[chosen], offset[chosen]
        self.waiting.append(Places(feature, batch.first_row + offset, documents[offset]))
        if sum(len(places.row) for places in self.waiting) > max(_KEPT_AT_ONCE, 2 * self.positions * len(self.count)):
            self.waiting = [self._kept()]

    def firings(self) -> Firings:
        """Everything added."""
        mean = self.sum / np.maximum(self.count, 1)
        rows, documents = np.concatenate(self.rows), np.concatenate(self.documents)
        return Firings(self.tokens, self.count, mean, self._kept(), rows, documents)

    def _kept(self) -> Places:
        columns = (
            np.concatenate([getattr(places, name) for places in self.waiting])
            for name in ("feature", "row", "document")
        )
        feature, row, document = columns
        kept = spread(feature, row, document, self.seed, self.positions)
        return Places(feature[kept], row[kept], document[kept])
