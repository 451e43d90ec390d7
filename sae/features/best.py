"""Keep the n best firings of each feature from a stream of blocks of firings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from sae.features.block import Block, Reach

WORST = 1 << 32


class Best:
    """The n firings with the lowest keys per feature, lowest first, each with its window. Ties go to the earlier row.

    Memory is d_sae · n windows, however long the stream. A firing is processed further only if it beats its feature's
    n-th key, which few do once each feature has n.

    Args:
        d_sae: number of features.
        n: firings kept per feature.
        reach: size of the windows.
        one_per_group: keep only the best of several firings in the same group (a document or a section of one).

    Attributes:
        key, row, value, group: `[d_sae, n]`; empty slots have key `WORST`.
        window: `[d_sae, n, width]`, float16.
    """

    def __init__(self, d_sae: int, n: int, reach: Reach, *, one_per_group: bool) -> None:
        self.n, self.reach, self.one_per_group = n, reach, one_per_group
        self.key = np.full((d_sae, n), WORST, dtype=np.int64)
        self.row = np.zeros((d_sae, n), dtype=np.int64)
        self.value = np.zeros((d_sae, n), dtype=np.float32)
        self.group = np.zeros((d_sae, n), dtype=np.int64)
        self.window = np.zeros((d_sae, n, reach.width), dtype=np.float16)

    def offer(self, block: Block, key: Int[np.ndarray, " firings"]) -> None:
        """Add a block's firings; keys are in [0, 2³²), and rows come after those of all earlier blocks."""
        chosen = np.flatnonzero(key < self.key[:, -1][block.feature])
        if not len(chosen):
            return
        filled = np.nonzero(self.key < WORST)
        feature = np.concatenate([filled[0], block.feature[chosen]])
        keys = np.concatenate([self.key[filled], key[chosen]])
        order = np.argsort((feature << 32) | keys, kind="stable")
        if self.one_per_group:
            group = np.concatenate([self.group[filled], block.group[chosen]])
            order = order[_first_of_each(feature[order], group[order])]
        rank = rank_within(feature[order])
        order, rank = order[rank < self.n], rank[rank < self.n]
        self._fill((feature[order], rank), order, filled, block, key, chosen)

    def _fill(
        self, slots: tuple[np.ndarray, np.ndarray], order: np.ndarray, filled: tuple[np.ndarray, ...],
        block: Block, key: np.ndarray, chosen: np.ndarray,
    ) -> None:  # fmt: skip
        """Fill the slots: from the old slots if `order` < len(filled[0]), otherwise from the block."""
        old = order < len(filled[0])
        old_slots, new_slots = (slots[0][old], slots[1][old]), (slots[0][~old], slots[1][~old])
        old_source = (filled[0][order[old]], filled[1][order[old]])
        new_source = chosen[order[~old] - len(filled[0])]
        new_columns = (key, block.row, block.value, block.group)
        for array, source in zip((self.key, self.row, self.value, self.group), new_columns, strict=True):
            array[old_slots] = array[old_source]
            array[new_slots] = source[new_source]
        self.window[old_slots] = self.window[old_source]
        self.window[new_slots] = block.windows(new_source, self.reach)


def rank_within(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The number of preceding elements of the same group, for each element; groups must be contiguous."""
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(begins, np.diff(begins, append=len(group)))


def _first_of_each(feature: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Positions of the first entry of each (feature, group), in order."""
    pair = feature * (int(group.max(initial=0)) + 1) + group
    return np.sort(np.unique(pair, return_index=True)[1])
