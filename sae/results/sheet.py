"""What a page shows of features that were ranked: sentences, a table, scores with intervals, and examples."""

from __future__ import annotations

from dataclasses import dataclass, field

from sae.results.estimate import Estimate
from sae.results.table import Table


@dataclass(frozen=True)
class ShownExample:
    """A held-out example of a feature.

    Attributes:
        positive: whether the example has the concept.
        value: the feature's value: its activation, or the mean over the tokens of a text.
        tokens: texts of the tokens around the strongest one.
        activations: the feature's activation on each token that is part of the example; 0 on the others.
        position: index of the strongest one.
    """

    positive: bool
    value: float
    tokens: list[str]
    activations: list[float]
    position: int


@dataclass(frozen=True)
class Scored:
    """A feature or a neuron with its AUC, and examples of it."""

    name: str
    auc: Estimate
    examples: tuple[ShownExample, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Sheet:
    """The content of a page.

    Attributes:
        title: its heading.
        subtitle: the line below.
        sentences: what the numbers say.
        table: one row per feature.
        scored: features and neurons, best first.
        chance: lower and upper end of what a search finds by chance.
    """

    title: str
    subtitle: str
    sentences: tuple[str, ...]
    table: Table
    scored: tuple[Scored, ...]
    chance: tuple[float, float]
