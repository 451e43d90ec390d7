"""Several sources of text in one run: the names of their documents, their shares, and their turns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sae.errors import ConfigError
from sae.files.paths import expanded, name_of

_SMALLEST_SHARE = 1e-9


def check_mixture(sources: Sequence[str], weights: Sequence[float] | None) -> None:
    """Raise ConfigError if sources and weights do not match, or documents of two sources would share names."""
    if not sources:
        raise ConfigError("data.source=[]: name at least one source, such as stdlib")
    if weights is not None:
        _check_weights(sources, weights)
    by_label: dict[str, str] = {}
    for source, label in zip(sources, source_labels(sources), strict=True):
        other = by_label.get(label)
        if other is not None and Path(other) == Path(source):
            raise ConfigError(f"data.source names {source!r} twice: name it once, and give it more of data.weights")
        if other is not None:
            raise ConfigError(
                f"data.source: {other!r} and {source!r} both end in {label!r}, the prefix of their documents' names: "
                "rename one of them, or name it through a link (a hub data set: through a folder that it is saved to)"
            )
        by_label[label] = source


def source_labels(sources: Sequence[str]) -> tuple[str, ...]:
    """The prefix of each source's document names in a mix: the last part of the source's path."""
    return tuple(map(_last_part, sources))


def token_shares(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights as shares that sum to 1, to 12 digits: 7 and 3 give the same as 0.7 and 0.3."""
    largest = max(weights)
    total = math.fsum(weight / largest for weight in weights)
    return tuple(float(f"{weight / largest / total:.12g}") for weight in weights)


def tokens_by_source(labels: Sequence[str], names: Sequence[str], rows: Mapping[int, int]) -> dict[str, int]:
    """Tokens from each source, given the documents' names in a mix and the rows of each document by its number."""
    tokens = dict.fromkeys(labels, 0)
    for number, count in rows.items():
        tokens[names[number].partition("/")[0]] += count
    return tokens


class Turns:
    """Whose turn it is: the source with the fewest tokens given, divided by its share; the first in a tie.

    After T tokens, source i with share s_i and documents of at most L_i tokens has given g_i tokens, where

        −s_i · Σ_{j≠i} L_j  ≤  g_i − s_i T  ≤  (1 − s_i) · L_i,

    since every g_j lies between s_j v and s_j v + L_j, v being the least g_j / s_j: a source is never ahead by more
    than one of its own documents, nor, if there are two sources, behind by more than one document of the other.

    Attributes:
        given: tokens that each source has given.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = tuple(shares)
        self.given = [0] * len(self.shares)

    @property
    def source(self) -> int:
        """Number of the source that the next document comes from."""
        return min(range(len(self.shares)), key=lambda number: self.given[number] / self.shares[number])

    def give(self, tokens: int) -> None:
        """Count the tokens of a document from that source."""
        self.given[self.source] += tokens


def _check_weights(sources: Sequence[str], weights: Sequence[float]) -> None:
    listed = list(weights)
    if len(sources) == 1:
        raise ConfigError(
            f"data.weights={listed} with one source, {sources[0]!r}: weights divide the tokens among several sources; "
            "leave data.weights out, or list more in data.source"
        )
    if len(weights) != len(sources):
        raise ConfigError(
            f"data.weights={listed} has {len(weights)} for the {len(sources)} sources of "
            f"data.source={list(sources)}: give each source one, or leave data.weights out for equal shares"
        )
    if not all(0 < weight < math.inf for weight in weights) or min(token_shares(weights)) < _SMALLEST_SHARE:
        raise ConfigError(
            f"data.weights={listed}: expected positive numbers, the least no less than a billionth of their sum; to "
            "leave a source out, remove it from data.source"
        )


def _last_part(source: str) -> str:
    path = Path(source)
    return name_of(expanded(path).resolve().name if path.name in ("", "..", "~") else path.name)
