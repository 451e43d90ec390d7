"""The interface of the sparse core's back ends, which compute the same results at different speeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.pattern import Pattern

DENSE_ABOVE = 1 / 12
"""Density above which codes are computed densely (docs/performance.md)."""


@dataclass(frozen=True)
class Subset:
    """Features for a second selection in the same pass over the encoder: the dead ones, for AuxK.

    Attributes:
        features: the candidates, ascending.
        penalty: added to their pre-activations; −inf excludes a candidate.
        k: number selected in every row; at most the number of candidates.
    """

    features: Int[Tensor, " candidates"]
    penalty: Float[Tensor, " candidates"]
    k: int


class Selection(NamedTuple):
    """Selected pre-activations.

    Attributes:
        pattern: the selected pairs.
        values: their pre-activations, whatever their sign.
        subset_values: pre-activations selected in the subset; None without a subset.
        subset_places: their positions in `Subset.features`.
        total: number of entries to select, if they were selected for a capacity, which it may exceed.
    """

    pattern: Pattern
    values: Float[Tensor, " pairs"]
    subset_values: Float[Tensor, "batch k"] | None = None
    subset_places: Int[Tensor, "batch k"] | None = None
    total: Int[Tensor, ""] | None = None


@dataclass
class Room:
    """Room for the pairs above thresholds, whose number depends on the data.

    Attributes:
        capacity: number of pairs that there is room for; None: as many as there are; to know, the device is waited for.
        enter: called with the number of pairs on the device when they have been selected for a capacity; those beyond
            it are lost.
        pairs: number of pairs that were selected without a capacity; None: none were.
    """

    capacity: int | None = None
    enter: Callable[[Int[Tensor, ""]], None] | None = None
    pairs: int | None = None


NOTHING = -1e30
"""Pre-activation of padding: no feature fires at it, and every gradient is 0 there."""


@dataclass(frozen=True)
class FactoredGradient:
    """A gradient of a `[d_sae, d_in]` matrix in factors: G[j] = Σ over pairs (i, j) of coefficient · rows[i]."""

    pattern: Pattern
    coefficients: Float[Tensor, " pairs"]
    rows: Float[Tensor, "batch d_in"]


@dataclass(frozen=True)
class RowGradient:
    """A gradient of some rows of a `[d_sae, d_in]` matrix: G[features] += gradient. No feature occurs twice."""

    features: Int[Tensor, " some"]
    gradient: Float[Tensor, "some d_in"]


@dataclass(frozen=True)
class Gradient:
    """The gradient of a `[d_sae, d_in]` matrix as a sum of parts; only `dense` is as large as the matrix."""

    terms: Sequence[FactoredGradient] = ()
    blocks: Sequence[RowGradient] = ()
    dense: Float[Tensor, "d_sae d_in"] | None = None


@dataclass(frozen=True)
class AdamStep:
    """One step of Adam (Kingma & Ba 2015), as in `torch.optim.Adam`.

    Attributes:
        number: number of the step, starting at 1.
        unit_rows: the weights' rows are kept at norm 1: the gradient loses its part along each row before it enters the
            moments, and rows are renormalised after the step.
        scale: factor applied to the gradient first; None: 1.
        numbers: lr, 1 − beta1^number and 1 − beta2^number in float32 on the device, which Triton's kernel reads from
            there if they are given, so that a recorded launch takes those of its step.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    number: int
    unit_rows: bool = False
    scale: Float[Tensor, ""] | None = None
    numbers: Float[Tensor, 3] | None = None


def adam_numbers(step: AdamStep) -> Float[Tensor, 3]:
    """`AdamStep.numbers` on the CPU."""
    corrections = (1 - beta**step.number for beta in (step.beta1, step.beta2))
    return torch.tensor([step.lr, *corrections], dtype=torch.float32)


@dataclass(frozen=True)
class Moments:
    """Adam's running means of the gradient and of its square, in the shape of the weight."""

    first: Float[Tensor, "d_sae d_in"] = field(repr=False)
    second: Float[Tensor, "d_sae d_in"] = field(repr=False)


@runtime_checkable
class Kernels(Protocol):
    """A back end. Matrices are by feature: `encoder[j]` reads feature j, `decoder[j]` writes it; both `[d_sae, d_in]`.

    Nothing here takes part in autograd; `sae.kernels.sparse` adds it. On a GPU with Triton, only two functions wait for
    the device: `select_above` without a capacity, because the size of its result depends on the data, and `adam_` for
    rows above 8,192.
    """

    def select_topk(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        k: int,
        subset: Subset | None = None,
    ) -> Selection:
        """The k largest of each row of x · encoderᵀ + bias, in no order. Ties are broken in some fixed way."""
        ...

    def select_batch_topk(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        count: int,
        subset: Subset | None = None,
    ) -> Selection:
        """The `count` largest of all entries of x · encoderᵀ + bias, ordered by row, then by feature."""
        ...

    def select_above(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        threshold: Float[Tensor, " d_sae"],
    ) -> Selection:
        """All entries of x · encoderᵀ + bias above their feature's threshold, and all NaNs.

        Triton's has another argument `capacity`: with it, the result has this many pairs, whatever the data, with
        padding at the end (`Pattern.is_padded`) whose values are `NOTHING`, and `total` says how many there are.
        """
        ...

    def decode(
        self, pattern: Pattern, values: Float[Tensor, " pairs"], decoder: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "batch d_in"]:
        """Row i: Σ over its pairs of value · decoder[feature]."""
        ...

    def sampled_product(
        self, pattern: Pattern, gradient: Float[Tensor, "batch d_in"], decoder: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, " pairs"]:
        """Pair (i, j): gradient[i] · decoder[j], the gradient of `decode` with respect to its values."""
        ...

    def residual(
        self,
        pattern: Pattern,
        values: Float[Tensor, " pairs"],
        decoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_in"] | None,
        target: Float[Tensor, "batch d_in"],
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, " pairs"]]:
        """target − `decode` − bias, and `sampled_product` of this residual."""
        ...

    def feature_sums(self, term: FactoredGradient) -> Float[Tensor, "d_sae d_in"]:
        """The dense matrix of a factored gradient."""
        ...

    def column_sums(self, pattern: Pattern, values: Float[Tensor, " pairs"]) -> Float[Tensor, " d_sae"]:
        """Feature j: Σ of the values of its pairs, always in the same order."""
        ...

    def gradient_squares(
        self, weight: Float[Tensor, "d_sae d_in"], gradient: Gradient, unit_rows: bool
    ) -> Float[Tensor, " d_sae"]:
        """Squared norm of every row of the gradient, without its part along the weight's row if `unit_rows`."""
        ...

    def adam_(
        self,
        weight: Float[Tensor, "d_sae d_in"],
        moments: Moments,
        gradient: Gradient,
        step: AdamStep,
        copy: Float[Tensor, "d_sae d_in"] | None = None,
    ) -> None:
        """Update the weight and its moments by one step of Adam; `copy`, in bfloat16, is set to the new weight."""
        ...
