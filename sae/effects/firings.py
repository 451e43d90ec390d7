"""Where features fire in held-out text: how often, how strongly, and a seeded sample of the places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae.activations.cache import ActivationCache
from sae.config.progress import StageProgress
from sae.config.splits import HELD_OUT
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError
from sae.features.keys import random_keys
from sae.features.scan import Fired, scan_contexts

_KEPT_AT_ONCE = 1 << 22


Rows = TypeVar("Rows", bound="Columns")


@dataclass(frozen=True)
class Columns:
    """Columns of one length."""

    def __len__(self) -> int:
        return len(next(iter(self.columns().values())))

    def columns(self) -> dict[str, np.ndarray]:
        """All columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def at(self: Rows, index: np.ndarray) -> Rows:
        """The entries selected by an index or a mask."""
        return type(self)(**{name: column[index] for name, column in self.columns().items()})

    @classmethod
    def joined(cls: type[Rows], parts: Sequence[Rows]) -> Rows:
        """The parts concatenated in order; at least one."""
        columns = [part.columns() for part in parts]
        return cls(**{name: np.concatenate([part[name] for part in columns]) for name in columns[0]})


@dataclass(frozen=True)
class Places(Columns):
    """Firings, sorted by feature; those of a feature in the order in which they are drawn."""

    feature: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]

    def rows_of(self, feature: int) -> Int[np.ndarray, " n"]:
        """Rows of the held-out split, in the order in which they are drawn."""
        start, end = np.searchsorted(self.feature, [feature, feature + 1])
        return self.row[start:end]


@dataclass(frozen=True)
class Firings:
    """The firings found in one pass over held-out activations.

    Attributes:
        tokens: number of eligible tokens read.
        count: number of these on which each feature fires.
        mean: each feature's mean activation on them; 0 if it never fires.
        places: some measurable firings of each feature: those with a next token in their context.
        rows: all measurable rows.
        documents: the document of each row read, an index into the cache's held-out documents.
    """

    tokens: int
    count: Int[np.ndarray, " d_sae"]
    mean: Float[np.ndarray, " d_sae"]
    places: Places
    rows: Int[np.ndarray, " n"]
    documents: Int[np.ndarray, " rows"]

    @property
    def density(self) -> Float[np.ndarray, " d_sae"]:
        """Share of the eligible tokens on which each feature fires."""
        return self.count / max(1, self.tokens)


def scan_firings(
    dictionary: Dictionary,
    cache: ActivationCache,
    hook: str,
    *,
    positions: int,
    seed: int,
    tokens: int | None = None,
    features: Sequence[int] | None = None,
    progress: StageProgress | None = None,
) -> Firings:
    """Encode held-out activations once and keep at most `positions` firing places per feature.

    Args:
        dictionary: takes raw activations; tokens are encoded on its device.
        cache: its held-out split is read.
        hook: hook point that the dictionary reads.
        positions: maximum number of places kept per feature; see `spread`.
        seed: seed of the draw. The draw of a firing depends only on the seed, the feature and the row.
        tokens: held-out tokens to read, in whole contexts; None: all.
        features: features whose places are kept; None: all.
        progress: called with the number of tokens done and the total.

    Raises:
        ConfigError: `tokens` is less than one context, or no row can be measured.
    """
    collector = _Collector(dictionary.d_sae, positions, seed, features)
    for fired in scan_contexts(dictionary, cache, HELD_OUT, hook, tokens=tokens, progress=progress):
        collector.add_(fired)
    if not sum(map(len, collector.rows)):
        scope = "all held-out tokens" if tokens is None else f"the first {tokens:,} held-out tokens"
        raise ConfigError(
            f"effects: in {scope} the token policy leaves none with a next token in its context; read at least one "
            f"context ({cache.context_length} tokens)"
        )
    return collector.firings()


def measurable(eligible: Bool[torch.Tensor, "context seq"]) -> Bool[torch.Tensor, "context seq"]:
    """Positions whose loss counts: eligible, with a next token in their context."""
    counted = eligible.clone()
    counted[:, -1] = False
    return counted


def spread(
    feature: Int[np.ndarray, " n"], row: Int[np.ndarray, " n"], document: Int[np.ndarray, " n"], seed: int, most: int
) -> Int[np.ndarray, " kept"]:
    """Indices of at most `most` firings per feature, in random order, with documents taking turns.

    Each document contributes one firing before any contributes a second, so long documents do not crowd out the
    others. Selecting from parts and then from the selected firings gives the same result as selecting from all at once.
    """
    key = random_keys(torch.from_numpy(feature), torch.from_numpy(row), "effects: places", seed).numpy()
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


class _Collector:
    """Running counts and the firings kept so far."""

    def __init__(self, d_sae: int, positions: int, seed: int, features: Sequence[int] | None) -> None:
        self.positions, self.seed, self.tokens = positions, seed, 0
        self.selected = np.ones(d_sae, dtype=bool) if features is None else np.isin(np.arange(d_sae), features)
        self.count = np.zeros(d_sae, dtype=np.int64)
        self.sum = np.zeros(d_sae, dtype=np.float64)
        self.rows: list[np.ndarray] = []
        self.documents: list[np.ndarray] = []
        self.waiting: list[Places] = []

    def add_(self, fired: Fired) -> None:
        """Add the firings in a few contexts."""
        batch, (feature, offset, value) = fired.batch, fired.on_host()
        documents, counts = batch.documents.flatten().numpy(), measurable(batch.eligible).flatten().numpy()
        self.tokens += fired.tokens
        self.count += np.bincount(feature, minlength=len(self.count))
        self.sum += np.bincount(feature, weights=value, minlength=len(self.sum))
        self.rows.append(batch.first_row + np.flatnonzero(counts))
        self.documents.append(documents)
        chosen = counts[offset] & self.selected[feature]
        feature, offset = feature[chosen], offset[chosen]
        self.waiting.append(Places(feature, batch.first_row + offset, documents[offset]))
        if sum(map(len, self.waiting)) > max(_KEPT_AT_ONCE, 2 * self.positions * len(self.count)):
            self.waiting = [self._kept()]

    def firings(self) -> Firings:
        """The firings of all batches added."""
        mean = self.sum / np.maximum(self.count, 1)
        rows, documents = np.concatenate(self.rows), np.concatenate(self.documents)
        return Firings(self.tokens, self.count, mean, self._kept(), rows, documents)

    def _kept(self) -> Places:
        places = Places.joined(self.waiting)
        return places.at(spread(places.feature, places.row, places.document, self.seed, self.positions))
