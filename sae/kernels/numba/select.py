"""TopK's and BatchTopK's selection, a tile of the encoder's product at a time, in threads that share nothing.

A thread multiplies its rows with some hundred features and looks at the result while it is in its core's cache, so that
`[batch, d_sae]` never exists, nor any large part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.cpu import least
from sae.kernels.interface import Selection, Subset
from sae.kernels.numba.largest import Largest
from sae.kernels.pattern import Pattern
from sae.kernels.products import one_thread_each, tile_product
from sae.kernels.threads import in_parts

MOST_ROWS = 2048
TILE_NUMBERS, LEAST_COLUMNS = 1 << 20, 256
SURPLUS = 1.25
"""Number of entries that a thread contributes to the batch's selection, relative to its share."""


@dataclass(frozen=True)
class _Encoder:
    """Operands of the product: the encoder's type may be bfloat16, the bias has that of the results."""

    x: Float[Tensor, "batch d_in"]
    encoder: Float[Tensor, "d_sae d_in"]
    bias: Float[Tensor, " d_sae"]
    subset: Subset | None
    offsets: Float[Tensor, " candidates"] | None

    @staticmethod
    def of(x: Tensor, encoder: Tensor, bias: Tensor, subset: Subset | None) -> _Encoder:
        offsets = None if subset is None else bias.detach()[subset.features] + subset.penalty
        return _Encoder(x.detach().contiguous(), encoder.detach().contiguous(), bias.detach(), subset, offsets)

    def feed(self, start: int, stop: int, largest: Largest, in_subset: Largest | None, shared: bool) -> None:
        """Give the product of some rows to what selects from it, tile by tile.

        Args:
            start, stop: the rows.
            largest: takes all entries.
            in_subset: takes those of the subset, at their places in it.
            shared: whether the rows form one group; if so, places are row · d_sae + feature.
        """
        x, d_sae = self.x[start:stop], len(self.encoder)
        columns = max(LEAST_COLUMNS, TILE_NUMBERS // len(x) // 64 * 64)
        for first in range(0, d_sae, columns):
            last = min(first + columns, d_sae)
            tile = tile_product(x, self.encoder[first:last])
            place, width = (start * d_sae + first, d_sae) if shared else (first, 0)
            largest.take(tile, self.bias[first:last], place, width)
            if self.subset is not None and self.offsets is not None and in_subset is not None:
                features = self.subset.features
                few = slice(*torch.searchsorted(features, features.new_tensor([first, last])).tolist())
                among = tile.index_select(1, features[few] - first)
                in_subset.take(among, self.offsets[few], few.start, 0)


def select_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    subset: Subset | None = None,
) -> Selection:
    operands = _Encoder.of(x, encoder, bias, subset)
    values, features = bias.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64, device="cpu")
    among = _Among(len(x), bias, subset)

    def part(start: int, stop: int) -> None:
        largest, in_subset = Largest(stop - start, k, _dtype(bias)), among.begin(start, stop)
        operands.feed(start, stop, largest, in_subset, shared=False)
        values.numpy()[start:stop], features.numpy()[start:stop] = largest.cut()
        among.end(start, stop, in_subset)

    with one_thread_each():
        in_parts(part, len(x), MOST_ROWS)
    return Selection(Pattern.from_indices(features, len(encoder)), values.flatten(), among.values, among.places)


def select_batch_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    count: int,
    subset: Subset | None = None,
) -> Selection:
    """Each thread contributes the largest entries of its rows, `SURPLUS` times its share of `count`.

    The count-th largest contribution cannot exceed the count-th largest of the batch. If it is below a thread's
    smallest contribution, that thread may have left out an entry that belongs to the selection, and contributes the
    `count` largest of its rows instead, from a second product. Such threads are rare.
    """
    operands, d_sae = _Encoder.of(x, encoder, bias, subset), len(encoder)
    among = _Among(len(x), bias, subset)
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def contribute(start: int, stop: int, number: int, in_subset: Largest | None) -> None:
        largest = Largest(1, min(number, (stop - start) * d_sae), _dtype(bias))
        operands.feed(start, stop, largest, in_subset, shared=True)
        values, places = largest.cut()
        found[start, stop] = torch.from_numpy(values[0]), torch.from_numpy(places[0])

    def part(start: int, stop: int) -> None:
        in_subset = among.begin(start, stop)
        contribute(start, stop, int(SURPLUS * count * (stop - start) / len(x)) + 1, in_subset)
        among.end(start, stop, in_subset)

    with one_thread_each():
        in_parts(part, len(x), MOST_ROWS)
    parts, complete = sorted(found), set[tuple[int, int]]()
    while True:
        values, places = (torch.cat([found[rows][which] for rows in parts]) for which in (0, 1))
        bound = least(values.topk(count, sorted=False).values)
        smallest = {rows: least(found[rows][0]) for rows in parts if rows not in complete}
        rows = max(smallest, key=smallest.__getitem__, default=None)
        if rows is None or smallest[rows] <= bound:
            break
        contribute(*rows, count, None)
        complete.add(rows)
    kept = values.topk(count, sorted=False).indices
    places, order = places[kept].sort()
    pattern = Pattern.from_places(places, len(x), d_sae)
    return Selection(pattern, values[kept[order]], among.values, among.places)


class _Among:
    """The second selection, in a subset of the features; nothing without a subset."""

    def __init__(self, rows: int, bias: Tensor, subset: Subset | None) -> None:
        self.k, self.dtype = 0 if subset is None else subset.k, _dtype(bias)
        self.values: Float[Tensor, "batch k"] | None = None
        self.places: Int[Tensor, "batch k"] | None = None
        if subset is not None:
            self.values, self.places = bias.new_empty(rows, self.k), subset.features.new_empty(rows, self.k)

    def begin(self, start: int, stop: int) -> Largest | None:
        return None if self.values is None else Largest(stop - start, self.k, self.dtype)

    def end(self, start: int, stop: int, largest: Largest | None) -> None:
        if largest is not None and self.values is not None and self.places is not None:
            self.values.numpy()[start:stop], self.places.numpy()[start:stop] = largest.cut()


def _dtype(like: Tensor) -> np.dtype:
    return like.detach().numpy().dtype
