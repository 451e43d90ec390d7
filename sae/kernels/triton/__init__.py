"""The back end for a GPU, in Triton.

The encoder's product keeps what reaches a guess, row by row, and drops the rest while it is still in registers; the k
largest are then found among some hundreds of candidates. The guess comes from a sample of the features; where it
misses, once in millions of rows, the row is made again and searched exactly, on the device. Decoding and the gradient
of the codes are a program for each row. The update is a program for each feature: it sums the feature's gradient from
the pairs in which it fires, projects, steps, renormalises and writes the weight, and the gradient is gone.

Bytes a step moves at least, in float32: 24 · 2 · d_in · d_sae for Adam, and 4 · d_in for each of the batch · k pairs
four times (decode, gradient of the codes, both matrices), most of these from the cache. `[batch, d_sae]` is never
written. Nothing waits for the device but `select_above`.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from sae.kernels.interface import Selection, Subset
from sae.kernels.pattern import Pattern
from sae.kernels.triton.batch import above, largest_of_batch
from sae.kernels.triton.codes import decode, feature_sums, value_gradients
from sae.kernels.triton.topk import largest_of_rows
from sae.kernels.triton.update import adam_


def select_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    subset: Subset | None = None,
) -> Selection:
    x, encoder = x.contiguous(), encoder.contiguous()
    values, features = largest_of_rows(x, encoder, bias, k)
    pattern = Pattern.from_indices(features, len(encoder))
    return Selection(pattern, values.flatten(), *_in_subset(x, encoder, bias, subset))


def select_batch_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    count: int,
    subset: Subset | None = None,
) -> Selection:
    x, encoder = x.contiguous(), encoder.contiguous()
    pattern, values = largest_of_batch(x, encoder, bias, count)
    return Selection(pattern, values, *_in_subset(x, encoder, bias, subset))


def select_above(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
) -> Selection:
    return Selection(*above(x.contiguous(), encoder.contiguous(), bias, threshold))


def _in_subset(
    x: Tensor, encoder: Tensor, bias: Tensor, subset: Subset | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The same selection among the rows of the encoder that the subset names, copied together."""
    if subset is None:
        return None, None
    rows, features = encoder[subset.features], bias[subset.features] + subset.penalty
    return largest_of_rows(x, rows, features, subset.k)


__all__ = [
    "adam_",
    "decode",
    "feature_sums",
    "select_above",
    "select_batch_topk",
    "select_topk",
    "value_gradients",
]
