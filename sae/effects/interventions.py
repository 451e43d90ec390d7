"""Changes of activations: which are to be made, and what came of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sae.effects.firings import Firings
from sae.numerics.seeding import numpy_generator

FIRING, RANDOM, ELSEWHERE = 0, 1, 2
"""Kinds of change: of a feature where it fires; as long, in a random direction; of a feature where it does not fire."""


@dataclass(frozen=True)
class Plan:
    """Changes to be made: of which feature, at which row of the held-out split, and of which kind."""

    feature: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    kind: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.row)

    def at(self, index: np.ndarray) -> Plan:
        """Those that an index or a mask picks."""
        return Plan(self.feature[index], self.row[index], self.kind[index])


@dataclass(frozen=True)
class Changes:
    """Changes that were made, one an entry, and what they did, in nats.

    Attributes:
        feature, row, kind: as planned.
        document: of the row, an index into the held-out documents.
        activation: f of the feature at the row.
        loss: loss of the next token there, changed − clean.
        loss_after: the same of the following positions, summed.
        kl: KL(clean ‖ changed) of the next-token distributions there.
        kl_after: the same of the following positions, summed.
        direct: first-order change of the loss there along the direct path; not a number where there is none.
    """

    feature: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    kind: Int[np.ndarray, " n"]
    document: Int[np.ndarray, " n"]
    activation: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    loss_after: Float[np.ndarray, " n"]
    kl: Float[np.ndarray, " n"]
    kl_after: Float[np.ndarray, " n"]
    direct: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.row)

    def at(self, index: np.ndarray) -> Changes:
        """Those that an index or a mask picks."""
        return Changes(**{name: column[index] for name, column in self.columns().items()})

    def columns(self) -> dict[str, np.ndarray]:
        """Every column by its name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @staticmethod
    def joined(parts: Iterable[Changes]) -> Changes:
        """One part after the other."""
        columns = [part.columns() for part in parts]
        if not columns:
            return NO_CHANGES
        return Changes(**{name: np.concatenate([part[name] for part in columns]) for name in columns[0]})


_WHOLE = ("feature", "row", "kind", "document")
NO_CHANGES = Changes(**{
    field.name: np.zeros(0, dtype=np.int64 if field.name in _WHOLE else np.float64)
    for field in dataclasses.fields(Changes)
})  # fmt: skip


def plan_changes(features: Sequence[int], firings: Firings, *, null_positions: int, seed: int) -> Plan:
    """What is changed to measure features: each where it fires, and its two nulls.

    Random directions go to the first `null_positions` of a feature's places, its own direction to as many rows drawn
    from all (where it does fire after all, the meter leaves it out). Features with no place to measure have none.

    Args:
        features: indices.
        firings: their places, and the rows that can be measured.
        null_positions: of each null.
        seed: of the rows drawn; those of a feature depend on it and on the feature alone.
    """
    feature: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    row, kind = list(feature), list(feature)
    for index in features:
        places = firings.places.rows_of(index)
        if not len(places):
            continue
        draw = numpy_generator("effects: rows elsewhere", seed, index)
        elsewhere = draw.choice(firings.rows, min(null_positions, len(firings.rows)), replace=False)
        for which, rows in ((FIRING, places), (RANDOM, places[:null_positions]), (ELSEWHERE, elsewhere)):
            feature.append(np.full(len(rows), index, dtype=np.int64))
            row.append(rows.astype(np.int64))
            kind.append(np.full(len(rows), which, dtype=np.int64))
    return Plan(np.concatenate(feature), np.concatenate(row), np.concatenate(kind))
