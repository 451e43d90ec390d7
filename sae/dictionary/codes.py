"""Sparse codes: which features fire for each input, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """Sparse codes: the features that fire for each input, strongest first.

    Attributes:
        values: activations ≥ 0; rows with fewer active features than the longest row are padded with 0.
        indices: their features; if the value is 0, the index has no meaning.
    """

    values: Float[Tensor, "*batch k"]
    indices: Int[Tensor, "*batch k"]

    def __iter__(self):
        return iter((self.values, self.indices))

    def __getitem__(self, inputs: Any) -> Codes:
        """The codes of some inputs, indexed as in `values[inputs]`."""
        return Codes(self.values[inputs], self.indices[inputs])

    def dense(self, d_sae: int) -> Float[Tensor, "*batch d_sae"]:
        """Every feature's activation, 0 for those that do not fire; differentiable in the values.

        Args:
            d_sae: number of features of the dictionary.
        """
        zeros = self.values.new_zeros(*self.values.shape[:-1], d_sae)
        return zeros.scatter_add(-1, self.indices.expand_as(self.values), self.values)
