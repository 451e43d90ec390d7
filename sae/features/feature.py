"""A feature as plain values without tensors, for reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class TokenLogit(NamedTuple):
    """A token and the change of its logit per unit of activation, up to a positive factor."""

    token: str
    logit: float


class Neighbour(NamedTuple):
    """Another feature, the cosine between the decoder directions, and whether that feature is dead."""

    feature: int
    cosine: float
    dead: bool


@dataclass(frozen=True)
class Histogram:
    """Counts of non-zero activations between adjacent edges, from the first non-empty bin to the last."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Example:
    """A token on which a feature fired, in its context.

    Attributes:
        value: the activation there.
        document: name of the document.
        row: the token's row in the split that was scanned.
        tokens: text of the tokens around it; a character made of several tokens is in the token that completes it.
        activations: the feature's activation on each token; 0 on masked tokens.
        position: index of the token that fired.
    """

    value: float
    document: str
    row: int
    tokens: list[str]
    activations: list[float]
    position: int


@dataclass(frozen=True)
class Feature:
    """Everything the store has on a feature.

    Attributes:
        index: its row of W_dec.
        density: share of the eligible tokens on which it fired.
        count: number of these tokens.
        dead: whether it never fired in the tokens scanned.
        max: largest activation.
        mean: mean of the non-zero activations.
        histogram: histogram of the non-zero activations.
        top: the strongest activations, at most one per document (or per section if there are few documents),
            strongest first.
        quantiles: random activations from equal-count shares of the non-zero ones, strongest share first.
        promoted: the next tokens it makes more likely, strongest first; None if the store has no logits.
        suppressed: the next tokens it makes less likely.
        neighbours: the features with the most similar decoder directions.
    """

    index: int
    density: float
    count: int
    dead: bool
    max: float
    mean: float
    histogram: Histogram
    top: list[Example]
    quantiles: list[list[Example]]
    promoted: list[TokenLogit] | None
    suppressed: list[TokenLogit] | None
    neighbours: list[Neighbour]

    @property
    def peek(self) -> list[str]:
        """The tokens it fires on in its strongest examples, by total activation, largest first."""
        totals: dict[str, float] = {}
        for example in self.top:
            token = example.tokens[example.position] or "◌"  # part of a character
            totals[token] = totals.get(token, 0.0) + example.value
        return sorted(totals, key=lambda token: -totals[token])
