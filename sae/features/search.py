"""Search a feature store: by the tokens features fire on, promote and suppress, and by the labels a user gave them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int
from torch import Tensor

from sae.features.text import visible
from sae.model.vocabulary import Vocabulary

EXACT, BEGINS, CONTAINS = range(3)
"""How well a text matches a query; lower is better."""
_NUMBER, _LABEL, _FIRES, _PROMOTES, _SUPPRESSES = range(5)
_LOGITS = {_PROMOTES: "promotes", _SUPPRESSES: "suppresses"}


@dataclass(frozen=True, order=True)
class Reason:
    """Why a feature was found.

    Attributes:
        quality: whether the query is the whole token or whole words of a label (0), its beginning (1), or a part (2).
        kind: in the order number, label, fires, promotes, suppresses.
        weakness: 0 for the strongest of its kind, below 1.
        text: such as "fires on ' Paris' in 12 of 20 examples".
    """

    quality: int
    kind: int
    weakness: float
    text: str = field(compare=False)


@dataclass(frozen=True)
class Hit:
    """A feature that was found.

    Attributes:
        feature: its number.
        reasons: why, best first; never empty.
        dead: whether it never fired.
    """

    feature: int
    reasons: tuple[Reason, ...]
    dead: bool

    @property
    def why(self) -> str:
        """The reasons as text."""
        return "; ".join(reason.text for reason in self.reasons)


def quality_of(text: str, query: str) -> int | None:
    """How well a token matches, in any case; None: not at all. Spaces around it count only if the query has them."""
    text, query = text.lower(), query.lower()
    if query == query.strip():
        text = text.strip()
    if text == query:
        return EXACT
    return BEGINS if text.startswith(query) else CONTAINS if query in text else None


@dataclass(frozen=True)
class Searched:
    """The parts of a feature store that are searched.

    Attributes:
        columns: those of `layout.COLUMNS`.
        tokens: token ids of the scanned text.
        before: tokens of a window before its own token.
        vocabulary: texts of the tokens.
        labels: texts that a user gave features.
    """

    columns: Mapping[str, Tensor]
    tokens: Int[Tensor, " rows"]
    before: int
    vocabulary: Vocabulary
    labels: Mapping[int, str]

    def search(self, query: str) -> list[Hit]:
        """The features that match, best first: living ones first, then by their best reason."""
        if not query.strip():
            return []
        reasons: dict[int, list[Reason]] = {}
        for feature, reason in self._reasons(query):
            reasons.setdefault(feature, []).append(reason)
        dead = self.columns["count"] == 0
        hits = [Hit(feature, tuple(sorted(found)), bool(dead[feature])) for feature, found in reasons.items()]
        return sorted(hits, key=lambda hit: (hit.dead, hit.reasons[0], hit.feature))

    def _reasons(self, query: str) -> Iterator[tuple[int, Reason]]:
        features = len(self.columns["count"])
        number = query.strip().removeprefix("#")
        if number.isascii() and number.isdecimal() and len(number) < 10 and int(number) < features:
            yield int(number), Reason(EXACT, _NUMBER, 0.0, f"feature {int(number)}")
        yield from self._by_label(query.strip())
        qualities = np.full(len(self.vocabulary), -1)
        for token in range(len(self.vocabulary)):
            quality = quality_of(self.vocabulary.text(token), query)
            if quality is not None:
                qualities[token] = quality
        yield from self._by_firing(qualities)
        for kind in _LOGITS:
            yield from self._by_logits(kind, qualities)

    def _by_label(self, query: str) -> Iterator[tuple[int, Reason]]:
        whole = re.compile(rf"(?<!\w){re.escape(query)}(?!\w)", re.IGNORECASE)
        for feature, label in self.labels.items():
            if query.lower() in label.lower():
                quality = EXACT if whole.search(label) else CONTAINS
                yield feature, Reason(quality, _LABEL, 0.0, f"label {label!r}")

    def _by_firing(self, qualities: Int[np.ndarray, " tokens"]) -> Iterator[tuple[int, Reason]]:
        """Examples, both the strongest and random ones, in which a feature fires on a matching token."""
        columns = {name: self.columns[name].numpy() for name in ("example_start", "example_row", "window_offset")}
        starts, rows = columns["example_start"].astype(np.int64), columns["example_row"].astype(np.int64)
        windows = np.repeat(np.arange(len(rows)), self.columns["window_count"].numpy().astype(np.int64))
        around = rows[windows] - self.before + columns["window_offset"].astype(np.int64)
        example = np.concatenate([np.arange(len(rows)), windows])
        ids = self.tokens.numpy()[np.concatenate([rows, around])].astype(np.int64)
        known = (ids >= 0) & (ids < len(qualities))
        known[known] = qualities[ids[known]] >= 0
        example, ids = example[known], ids[known]
        feature = np.searchsorted(starts, example, "right") - 1
        order = np.argsort(feature, kind="stable")
        cuts = np.flatnonzero(np.diff(feature[order])) + 1
        for part in np.split(order, cuts) if len(order) else []:
            found = int(feature[part[0]])
            best = int(qualities[ids[part]].min())
            matching = part[qualities[ids[part]] == best]
            count, total = len(np.unique(example[matching])), int(starts[found + 1] - starts[found])
            texts, counts = np.unique(ids[matching], return_counts=True)
            token = self._shown(int(texts[counts.argmax()]))
            plural = "" if total == 1 else "s"
            text = f"fires on {token} in {count} of {total} example{plural}"
            yield found, Reason(best, _FIRES, 1 - count / total, text)

    def _by_logits(self, kind: int, qualities: Int[np.ndarray, " tokens"]) -> Iterator[tuple[int, Reason]]:
        name = {_PROMOTES: "promoted", _SUPPRESSES: "suppressed"}[kind]
        if name not in self.columns:
            return
        ids = self.columns[name].numpy().astype(np.int64)
        found = np.where(ids < len(qualities), qualities[np.minimum(ids, len(qualities) - 1)], -1)
        for feature in np.flatnonzero((found >= 0).any(1)).tolist():
            row = found[feature]
            best = row[row >= 0].min()
            place = int(np.flatnonzero(row == best)[0])
            text = f"{_LOGITS[kind]} {self._shown(int(ids[feature, place]))}"
            yield feature, Reason(int(best), kind, place / len(row), text)

    def _shown(self, token: int) -> str:
        return f"'{visible(self.vocabulary.text(token))}'"
