"""Every firing of every feature enumerated in plain Python: slow, and with nothing in common with the package."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Firing:
    value: float
    row: int
    document: int


class Reference:
    """`codes[row][feature]` are dense activations; masked rows do not fire."""

    def __init__(self, codes, documents, eligible, context_length):
        self.codes, self.documents, self.eligible = codes, documents, eligible
        self.context_length, self.rows = context_length, len(codes)
        self.tokens = sum(eligible)

    def activation(self, row: int, feature: int) -> float:
        return max(0.0, self.codes[row][feature]) if self.eligible[row] else 0.0

    def firings(self, feature: int) -> list[Firing]:
        values = ((row, self.activation(row, feature)) for row in range(self.rows))
        return [Firing(value, row, self.documents[row]) for row, value in values if value > 0]

    def top(self, feature: int, n: int) -> list[Firing]:
        seen, kept = set(), []
        for firing in sorted(self.firings(feature), key=lambda firing: (-firing.value, firing.row)):
            if firing.document not in seen:
                seen.add(firing.document)
                kept.append(firing)
        return kept[:n]

    def share(self, feature: int, row: int, quantiles: int) -> int:
        """Equal-count share of a firing, 0 the weakest; of equal values the earlier is the weaker."""
        ordered = sorted(self.firings(feature), key=lambda firing: (firing.value, firing.row))
        rank = [firing.row for firing in ordered].index(row)
        return int(Fraction(2 * rank + 1, 2 * len(ordered)) * quantiles)

    def window_rows(self, row: int, before: int, after: int) -> list[int]:
        """Rows around `row` in the same context."""
        near = range(max(0, row - before), min(self.rows, row + after + 1))
        return [other for other in near if other // self.context_length == row // self.context_length]
