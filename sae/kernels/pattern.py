"""Which features fire where: the positions of sparse codes, without their values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class ByFeature(NamedTuple):
    """The pairs of a pattern, sorted stably by feature, so that rows stay in order.

    Attributes:
        order: position of each sorted pair in the pattern.
        rows: the sorted pairs' rows.
        offsets: pairs of feature j are `order[offsets[j]:offsets[j + 1]]`.
    """

    order: Int[Tensor, " pairs"]
    rows: Int[Tensor, " pairs"]
    offsets: Int[Tensor, " d_sae_plus_1"]


@dataclass(frozen=True, eq=False)
class Pattern:
    """Positions of the non-zeros of a `[batch, d_sae]` matrix by rows (the CSR form): any number of features a row.

    A feature may occur in a row more than once; its values are added. The values of a pattern are a tensor `[pairs]`.

    Attributes:
        features: the features of row 0, then of row 1, and so on; int64.
        offsets: the features of row i are `features[offsets[i]:offsets[i + 1]]`; int64.
        d_sae: number of features in the dictionary.
        k: number of features per row if it is the same for all rows, else None.
        is_padded: whether pairs from `offsets[-1]` on, with feature 0, are padding: they belong to no row and to no
            feature, and only Triton's back end and what works on pairs alone takes them.
    """

    features: Int[Tensor, " pairs"]
    offsets: Int[Tensor, " batch_plus_1"]
    d_sae: int
    k: int | None = None
    is_padded: bool = False

    @staticmethod
    def from_indices(indices: Int[Tensor, "batch k"], d_sae: int) -> Pattern:
        """The pattern of k features in every row."""
        batch, k = indices.shape
        offsets = torch.arange(batch + 1, device=indices.device) * k
        return Pattern(indices.reshape(-1), offsets, d_sae, k)

    @staticmethod
    def from_places(places: Int[Tensor, " pairs"], batch: int, d_sae: int, *, is_padded: bool = False) -> Pattern:
        """The pattern of ascending places row · d_sae + feature; a place batch · d_sae is padding."""
        starts = torch.arange(batch + 1, device=places.device) * d_sae
        return Pattern(places % d_sae, torch.searchsorted(places, starts), d_sae, is_padded=is_padded)

    @staticmethod
    def of_nonzeros(matrix: Float[Tensor, "batch d_sae"]) -> tuple[Pattern, Float[Tensor, " pairs"]]:
        """Pattern of a matrix's non-zeros, by ascending features, and their values. Waits for the device."""
        places = matrix.flatten().nonzero()[:, 0]
        return Pattern.from_places(places, *matrix.shape), matrix.flatten()[places]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def pairs(self) -> int:
        """Number of (row, feature) pairs."""
        return len(self.features)

    @property
    def density(self) -> float:
        """Pairs over batch · d_sae."""
        return self.pairs / max(self.batch * self.d_sae, 1)

    @cached_property
    def rows(self) -> Int[Tensor, " pairs"]:
        """The row of each pair; of padding, the last."""
        device = self.features.device
        if self.k:
            return torch.arange(self.pairs, device=device) // self.k
        if self.is_padded:
            places = torch.arange(self.pairs, device=device)
            return torch.searchsorted(self.offsets[1:], places, right=True).clamp(max=self.batch - 1)
        return torch.arange(self.batch, device=device).repeat_interleave(self.offsets.diff(), output_size=self.pairs)

    @cached_property
    def by_feature(self) -> ByFeature:
        """The pairs sorted by feature; computed once, without waiting for the device."""
        features = self.features
        if self.is_padded:
            is_padding = torch.arange(self.pairs, device=features.device) >= self.offsets[-1]
            features = features.masked_fill(is_padding, self.d_sae)
        features, order = torch.sort(features, stable=True)
        offsets = torch.searchsorted(features, torch.arange(self.d_sae + 1, device=features.device))
        return ByFeature(order, self.rows[order], offsets)

    def ascending(self, values: Float[Tensor, " pairs"]) -> tuple[Pattern, Float[Tensor, " pairs"]]:
        """The same codes with the features of every row in ascending order; unchanged if rows differ in length."""
        if self.k is None:
            return self, values
        features, order = self.features.view(-1, self.k).sort(dim=-1)
        return replace(self, features=features.flatten()), values.view(-1, self.k).gather(-1, order).flatten()

    def dense(self, values: Float[Tensor, " pairs"]) -> Float[Tensor, "batch d_sae"]:
        """The dense matrix."""
        flat = values.new_zeros(self.batch * self.d_sae)
        return flat.index_add_(0, self.rows * self.d_sae + self.features, values).view(self.batch, self.d_sae)
