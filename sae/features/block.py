"""Firings of consecutive contexts, sorted by feature, which makes counting, comparing and cutting windows local."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class Reach:
    """How far a window extends around its token, and the contexts it never leaves.

    Attributes:
        before: tokens before it.
        after: tokens after it.
        context_length: rows per context; row r belongs to context r // context_length.
    """

    before: int
    after: int
    context_length: int

    @property
    def width(self) -> int:
        """Number of tokens in a full window."""
        return self.before + 1 + self.after


@dataclass(frozen=True)
class Block:
    """Non-zero activations, ordered by feature and then by row.

    Attributes:
        feature: the feature that fired.
        row: the token it fired on.
        value: the activation, > 0.
        group: the document (or section) that the token belongs to.
        place: feature and row as one number that increases along the block. For firings of the same feature and
            context, its difference is their distance; for all others, it exceeds a window's reach.
    """

    feature: Int[np.ndarray, " firings"]
    row: Int[np.ndarray, " firings"]
    value: Float[np.ndarray, " firings"]
    group: Int[np.ndarray, " firings"]
    place: Int[np.ndarray, " firings"]

    def __len__(self) -> int:
        return len(self.feature)

    def windows(self, chosen: Int[np.ndarray, " n"], reach: Reach) -> Float[np.ndarray, "n width"]:
        """The feature's activation on each token around the chosen firings; column `reach.before` is the firing itself.

        Neighbours of a firing are adjacent in the block, so only tokens that fire are visited.
        """
        window = np.zeros((len(chosen), reach.width), dtype=np.float16)
        window[:, reach.before] = np.minimum(self.value[chosen], LARGEST_FLOAT16)
        for step, limit in ((-1, reach.before), (1, reach.after)):
            active, position = np.arange(len(chosen)), chosen
            while len(active):
                position = position + step
                within = (position >= 0) & (position < len(self))
                active, position = active[within], position[within]
                distance = self.place[position] - self.place[chosen[active]]
                within = np.abs(distance) <= limit
                active, position, distance = active[within], position[within], distance[within]
                window[active, reach.before + distance] = np.minimum(self.value[position], LARGEST_FLOAT16)
        return window


def make_block(
    feature: Int[np.ndarray, " firings"],
    row: Int[np.ndarray, " firings"],
    value: Float[np.ndarray, " firings"],
    groups: Int[np.ndarray, " rows"],
    first_row: int,
    reach: Reach,
) -> Block:
    """Sort firings that are given in row order.

    Args:
        feature: the feature that fired.
        row: the token it fired on.
        value: the activation.
        groups: the document (or section) of each row, starting at `first_row`.
        first_row: the block's first row; a context begins there.
        reach: the windows that will be cut.
    """
    order = stable_order(feature)
    feature, row, value = feature[order].astype(np.int64), row[order], value[order]
    offset = row - first_row
    gap = max(reach.before, reach.after)
    spread = offset + offset // reach.context_length * gap
    stride = len(groups) + (len(groups) // reach.context_length + 2) * gap
    return Block(feature, row, value, groups[offset], feature * stride + spread)


def stable_order(feature: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Stable argsort by feature, 16 bits at a time: NumPy sorts 16-bit integers by radix."""
    order = np.argsort((feature & 0xFFFF).astype(np.uint16), kind="stable")
    high = feature >> 16
    if not high.any():
        return order
    return order[np.argsort(high[order].astype(np.uint16), kind="stable")]
