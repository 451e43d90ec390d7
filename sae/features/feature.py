"""What a feature looks like to a reader: plain values, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class TokenLogit(NamedTuple):
    """A token, and how much a unit of activation adds to its logit, up to a positive factor."""

    token: str
    logit: float


class Neighbour(NamedTuple):
    """Another feature, the cosine between the decoder directions, and whether it is dead."""

    feature: int
    cosine: float
    dead: bool


@dataclass(frozen=True)
class Histogram:
    """Counts of non-zero activations between each two edges, from the first bin that has any to the last."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Example:
    """A token on which a feature fired, in its context.

    Attributes:
        value: the activation there.
        document: name of the document.
        row: the token's row in the training split.
        tokens: text of the tokens around it; a character of several tokens stands with the one that completes it.
        activations: the feature's activation on each of them; 0 on tokens that were masked out.
        position: which of them fired.
    """

    value: float
    document: str
    row: int
    tokens: list[str]
    activations: list[float]
    position: int


@dataclass(frozen=True)
class Feature:
    """Everything that is kept of a feature.

    Attributes:
        index: its row of W_dec.
        density: share of the eligible tokens on which it fired.
        count: how many these were.
        dead: it never fired in the tokens scanned.
        max: largest activation.
        mean: mean of the non-zero activations.
        histogram: of the non-zero activations.
        top: the strongest activations, at most one a document (or a section of one, where documents are few),
            strongest first.
        quantiles: random activations from equal-count shares of the non-zero ones; the strongest share first.
        promoted: the next tokens it makes more likely, strongest first; None where logits are not known.
        suppressed: the next tokens it makes less likely.
        neighbours: the features of the most similar decoder directions.
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
        """The tokens it fires on in its strongest examples, the largest total activation first."""
        totals: dict[str, float] = {}
        for example in self.top:
            token = example.tokens[example.position] or "◌"  # a part of a character
            totals[token] = totals.get(token, 0.0) + example.value
        return sorted(totals, key=lambda token: -totals[token])
