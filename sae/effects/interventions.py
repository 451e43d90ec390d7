"""Changes of activations: the plan and the outcome of each change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from sae.effects.firings import Columns, Firings
from sae.numerics.seeding import numpy_generator

FIRING, RANDOM, ELSEWHERE = 0, 1, 2
"""Kinds of change: the feature where it fires; a random direction of equal length; the feature where it is silent."""


@dataclass(frozen=True)
class Plan(Columns):
    """Planned changes: the feature, the row of the held-out split and the kind of each."""

    feature: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    kind: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Changes(Columns):
    """Changes that were made and their effects in nats, one entry per change.

    Attributes:
        feature, row, kind: as planned.
        document: the row's document, an index into the held-out documents.
        activation: the feature's activation f at the row.
        loss: next-token loss at the row, changed − clean.
        loss_after: the same, summed over the following positions.
        kl: KL(clean ‖ changed) of the next-token distributions at the row.
        kl_after: the same, summed over the following positions.
        direct: first-order change of the loss at the row along the direct path; NaN if there is no such path.
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


_INTEGERS = ("feature", "row", "kind", "document")
NO_CHANGES = Changes(**{
    field.name: np.zeros(0, dtype=np.int64 if field.name in _INTEGERS else np.float64)
    for field in dataclasses.fields(Changes)
})  # fmt: skip


def plan_changes(features: Sequence[int], firings: Firings, *, null_positions: int, seed: int) -> Plan:
    """Plan the changes for measuring features: each feature where it fires, and its two nulls.

    Random directions are used at the first `null_positions` of a feature's places. The feature's own direction is used
    at the same number of rows drawn from all rows; the meter skips those where it does fire. A feature with no
    measurable place gets no changes.

    Args:
        features: feature indices.
        firings: their places, and all measurable rows.
        null_positions: maximum number of places for each null.
        seed: seed of the row draw, which depends only on the seed and the feature.
    """
    nothing = np.zeros(0, dtype=np.int64)
    plans = [Plan(nothing, nothing, nothing)]
    for index in features:
        places = firings.places.rows_of(index)
        if not len(places):
            continue
        draw = numpy_generator("effects: rows elsewhere", seed, index)
        elsewhere = draw.choice(firings.rows, min(null_positions, len(firings.rows)), replace=False)
        for change_kind, rows in ((FIRING, places), (RANDOM, places[:null_positions]), (ELSEWHERE, elsewhere)):
            feature, kind = (np.full(len(rows), number, dtype=np.int64) for number in (index, change_kind))
            plans.append(Plan(feature, rows.astype(np.int64), kind))
    return Plan.joined(plans)
