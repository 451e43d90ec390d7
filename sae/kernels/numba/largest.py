"""The k largest of numbers that come in tiles, each read once, while it is in the cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, bfloat16, int16

from sae.kernels.numba import loops

SPARE = 8
"""Entries that are kept in addition to twice the number that is asked for."""


class Largest:
    """The k largest numbers of each group so far, in any order, among at most 2k + `SPARE` that were kept.

    A group's bound is the k-th largest number when its entries were last cut down to k, and at first a number that k of
    the first tile's exceed: nothing below it can be among the k largest. It is NaN, which excludes nothing, while there
    is none. NaNs are larger than all numbers.

    Args:
        groups: a group for each row, or one for all rows.
        k: how many to keep; a group must be given at least as many.
        dtype: type of the values.
    """

    def __init__(self, groups: int, k: int, dtype: np.dtype) -> None:
        room = 2 * k + SPARE
        self.k = k
        self.values, self.places = np.empty((groups, room), dtype), np.empty((groups, room), np.int64)
        self.counts, self.bounds = np.zeros(groups, np.int64), np.full(groups, np.nan, dtype)

    def take(self, tile: Tensor, offsets: Tensor, first: int, width: int) -> None:
        """Take the numbers of a tile, to each of which its column's offset is added.

        Args:
            tile: `[rows, columns]`, in bfloat16 or the type of the values.
            offsets: `[columns]`, in the type of the values.
            first: place of the first column.
            width: distance of the places of two rows if they form one group; 0 if each is a group.
        """
        kernel, numbers = (loops.take_bfloat16, tile.view(int16)) if tile.dtype is bfloat16 else (loops.take, tile)
        state = self.values, self.places, self.counts, self.bounds
        kernel(numbers.numpy(), offsets.numpy(), first, width, *state, self.k)

    def cut(self) -> tuple[NDArray, NDArray]:
        """The k largest values of each group and their places, `[groups, k]`."""
        loops.cut(self.values, self.places, self.counts, self.bounds, self.k)
        return self.values[:, : self.k], self.places[:, : self.k]
