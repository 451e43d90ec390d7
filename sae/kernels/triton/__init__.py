"""The back end for a GPU, in Triton.

The encoder's product is computed some rows at a time, and kernels select from the buffer that has it. For TopK, a bound
from the maxima of groups of features leaves a few candidates; for BatchTopK, one from a sample of the features, and if
it misses, the product is computed again and searched exactly, on the device. `strategies.py` has, by shape, the choice
between this and a kernel that computes the product itself and selects before it leaves the registers.
Decoding and the gradient of the codes use one program per row. The update uses one program per feature: it sums the
feature's gradient from the pairs in which it fires, projects, steps, renormalises and writes the weight; the gradient
is never stored.

In float32, a step moves at least 24 · 2 · d_in · d_sae bytes for Adam, and four times 4 · d_in bytes for each of the
batch · k pairs (decode, gradient of the codes, both matrices), most of these from the cache. `[batch, d_sae]` exists a
buffer at a time. Only `select_above` without a capacity and updates of rows above 8,192 numbers wait for the device.
Atomics only count and never add values, so sums repeat bit for bit.

Triton launches on the current device, which may differ from the tensors' device: hence every `torch.cuda.device_of`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.interface import Selection, Subset
from sae.kernels.pattern import Pattern
from sae.kernels.triton.batch import above, largest_of_batch
from sae.kernels.triton.codes import column_sums, decode, feature_sums, residual, sampled_product
from sae.kernels.triton.rows import LARGEST_K, largest_from_buffer
from sae.kernels.triton.strategies import FUSED, strategy
from sae.kernels.triton.topk import largest_of_rows
from sae.kernels.triton.update import adam_, gradient_squares

__all__ = [
    "adam_",
    "column_sums",
    "decode",
    "feature_sums",
    "gradient_squares",
    "residual",
    "sampled_product",
    "select_above",
    "select_batch_topk",
    "select_topk",
]


def select_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    subset: Subset | None = None,
) -> Selection:
    x, encoder = x.contiguous(), encoder.contiguous()
    with torch.cuda.device_of(x):
        values, features = _largest(x, encoder, bias, k)
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
    with torch.cuda.device_of(x):
        pattern, values = largest_of_batch(x, encoder, bias, count)
        return Selection(pattern, values, *_in_subset(x, encoder, bias, subset))


def select_above(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    capacity: int | None = None,
) -> Selection:
    with torch.cuda.device_of(x):
        pattern, values, total = above(x.contiguous(), encoder.contiguous(), bias, threshold, capacity)
        return Selection(pattern, values, total=total)


def _in_subset(
    x: Tensor, encoder: Tensor, bias: Tensor, subset: Subset | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """TopK among the subset's encoder rows, which are copied together."""
    if subset is None:
        return None, None
    rows, features = encoder[subset.features], bias[subset.features] + subset.penalty
    return _largest(x, rows, features, subset.k)


def _largest(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k > LARGEST_K or strategy("rows", len(encoder)) == FUSED:
        return largest_of_rows(x, encoder, bias, k)
    return largest_from_buffer(x, encoder, bias, k)
