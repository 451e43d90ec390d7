"""The activations of a feature on the tokens around its firings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.features.ordering import places_of

LARGEST_FLOAT16 = 65504.0
GRID_NUMBERS = 1 << 28
"""Largest size of the grid; with more features than fit, it is filled several times."""


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

    def within_context(self) -> Reach:
        """The part that a context can fill."""
        most = self.context_length - 1
        return Reach(min(self.before, most), min(self.after, most), self.context_length)


class Windows:
    """Cuts windows out of a grid `[features, rows]` of activations, in which contexts are separated by zeros.

    Only the activations are written, and set to zero again. A window is a few adjacent numbers.

    Args:
        d_sae: number of features.
        reach: size of the windows.
        device: device of the activations.
    """

    def __init__(self, d_sae: int, reach: Reach, device: str | torch.device = "cpu") -> None:
        self.d_sae, self.reach, self.gap = d_sae, reach, max(reach.before, reach.after)
        self._grid = torch.zeros(0, dtype=torch.float16, device=device)

    def columns(self, offset: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
        """The grid's column for each of some rows; `offset` starts at the first of the contexts."""
        return offset + (offset // self.reach.context_length + 1) * self.gap

    def cut(
        self,
        feature: Int[Tensor, " firings"],
        column: Int[Tensor, " firings"],
        value: Float[Tensor, " firings"],
        rows: int,
        chosen: Int[Tensor, " chosen"],
        out: Float[Tensor, "chosen width"],
    ) -> None:
        """Write the window of each chosen firing to `out`; column `reach.before` of it is the firing itself.

        Args:
            feature: the feature of every firing in some contexts; none fires twice on a token.
            column: the grid's column for its token.
            value: the activation; values beyond float16 become the largest float16.
            rows: number of rows of the contexts.
            chosen: places of the chosen firings.
        """
        before, width = self.reach.before, self.reach.width
        stride = rows + -(-rows // self.reach.context_length) * self.gap
        at_once = min(self.d_sae, max(1, (GRID_NUMBERS - self.gap) // stride))
        grid = self._zeros(at_once * stride + self.gap)
        windows = grid.as_strided((len(grid) - width + 1, width), (1, 1))
        place, value = (feature * stride).add_(column), value.clamp_max(LARGEST_FLOAT16).half()
        if at_once == self.d_sae:
            grid.index_copy_(0, place, value)
            torch.index_select(windows, 0, place.index_select(0, chosen).sub_(before), out=out)
            grid.index_fill_(0, place, 0)
            return
        for first in range(0, self.d_sae * stride, at_once * stride):
            inside = places_of((place >= first) & (place < first + at_once * stride))
            here = place[inside] - first
            grid.index_copy_(0, here, value[inside])
            start = place[chosen] - first
            cut = places_of((start >= 0) & (start < at_once * stride))
            out[cut] = windows.index_select(0, start[cut] - before)
            grid.index_fill_(0, here, 0)

    def _zeros(self, numbers: int) -> Float[Tensor, " numbers"]:
        if len(self._grid) < numbers:
            self._grid = self._grid.new_zeros(numbers)
        return self._grid[:numbers]
