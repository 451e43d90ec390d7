"""Keep the best n firings of every feature while blocks of firings stream by."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from sae.features.block import Block, Reach

WORST = 1 << 32


class Best:
    """The n firings of lowest key per feature, lowest first, each with its window. Equal keys: the earlier row wins.

    Memory is d_sae · n windows, whatever streams by. A firing is looked at closely only if it beats the n-th key of its
    feature, which few do once every feature has n.

    Args:
        d_sae: number of features.
        n: firings kept per feature.
        reach: size of the windows.
        one_per_group: of several firings in one group (a document, or a section of one) only the best stays.

    Attributes:
        key, row, value, group: `[d_sae, n]`; slots that are empty have key `WORST`.
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
        """Take in a block's firings; keys are in [0, 2³²), rows beyond those of all blocks before."""
        chosen = np.flatnonzero(key < self.key[:, -1][block.feature])
        if not len(chosen):
            return
        kept = np.nonzero(self.key < WORST)
        feature = np.concatenate([kept[0], block.feature[chosen]])
        keys = np.concatenate([self.key[kept], key[chosen]])
        order = np.argsort((feature << 32) | keys, kind="stable")
        if self.one_per_group:
            group = np.concatenate([self.group[kept], block.group[chosen]])
            order = order[_first_of_each(feature[order], group[order])]
        rank = rank_within(feature[order])
        order, rank = order[rank < self.n], rank[rank < self.n]
        self._fill((feature[order], rank), order, kept, block, key, chosen)

    def _fill(
        self, slots: tuple[np.ndarray, np.ndarray], order: np.ndarray, kept: tuple[np.ndarray, ...],
        block: Block, key: np.ndarray, chosen: np.ndarray,
    ) -> None:  # fmt: skip
        """Put the survivors into the slots: where `order` < len(kept[0]) from the old slots, else from the block."""
        old = order < len(kept[0])
        old_slots, new_slots = (slots[0][old], slots[1][old]), (slots[0][~old], slots[1][~old])
        old_from = (kept[0][order[old]], kept[1][order[old]])
        new_from = chosen[order[~old] - len(kept[0])]
        fresh = (key, block.row, block.value, block.group)
        for array, source in zip((self.key, self.row, self.value, self.group), fresh, strict=True):
            array[old_slots] = array[old_from]
            array[new_slots] = source[new_from]
        self.window[old_slots] = self.window[old_from]
        self.window[new_slots] = block.windows(new_from, self.reach)


def rank_within(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """How many elements of the same group stand before each, where groups stand together."""
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(begins, np.diff(begins, append=len(group)))


def _first_of_each(feature: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Positions of the first entry of every (feature, group), in order."""
    pair = feature * (int(group.max(initial=0)) + 1) + group
    return np.sort(np.unique(pair, return_index=True)[1])
