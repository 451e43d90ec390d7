"""Every firing of every feature enumerated in plain Python: slow, and with nothing in common with the package."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
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

    def sampled_quantiles(
        self, feature: int, quantiles: int, per_quantile: int, most: int, scale: float, key: Callable[[int, int], int]
    ) -> list[list[int]]:
        """Rows shown of each share, strongest share first, if only the `most` firings with the lowest keys are kept.

        A firing's rank is known up to a sixteenth of an octave, and within it from the firings kept.
        """
        firings = self.firings(feature)
        counts = Counter(fine_bin(firing.value, scale) for firing in firings)
        kept = sorted(firings, key=lambda firing: (key(firing.row, feature), firing.row))[:most]
        groups: list[list[Firing]] = [[] for _ in range(quantiles)]
        for firing in kept:
            place = fine_bin(firing.value, scale)
            members = sorted((f.value, f.row) for f in kept if fine_bin(f.value, scale) == place)
            below = sum(count for number, count in counts.items() if number < place)
            within = Fraction(2 * members.index((firing.value, firing.row)) + 1, 2 * len(members)) * counts[place]
            share = int((below + within) / len(firings) * quantiles)
            if len(groups[-1 - share]) < per_quantile:
                groups[-1 - share].append(firing)
        return [[f.row for f in sorted(group, key=lambda f: (-f.value, f.row))] for group in groups]

    def window_rows(self, row: int, before: int, after: int) -> list[int]:
        """Rows around `row` in the same context."""
        near = range(max(0, row - before), min(self.rows, row + after + 1))
        return [other for other in near if other // self.context_length == row // self.context_length]


def fine_bin(value: float, scale: float) -> int:
    """Sixteenths of an octave above scale · 2⁻¹², from 0 to 255."""
    mantissa, exponent = math.frexp(value / scale)
    return min(max((exponent - 1 + 12) * 16 + int((2 * mantissa - 1) * 16), 0), 255)


def random_key(number: int, row: int, feature: int) -> int:
    """The hash of a firing in [0, 2³²); `number` stands for purpose and seed."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % (1 << 32)
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % (1 << 32)
        return x ^ (x >> 16)

    spread = (row + number) % (1 << 64)
    return mix(mix((spread ^ (spread >> 32)) % (1 << 32)) ^ (number >> 32) ^ feature * 0x9E3779B1 % (1 << 32))
