"""The back end for a GPU, in Triton.

The encoder's product keeps the numbers of each row that reach a guess, and drops the rest while they are still in
registers. The k largest are then found among some hundreds of candidates. The guess comes from a sample of the
features. If it misses, about once in millions of rows, the row is computed again and searched exactly, on the device.
Decoding and the gradient of the codes use one program per row. The update uses one program per feature: it sums the
feature's gradient from the pairs in which it fires, projects, steps, renormalises and writes the weight; the gradient
is never stored.

In float32, a step moves at least 24 · 2 · d_in · d_sae bytes for Adam, and four times 4 · d_in bytes for each of the
batch · k pairs (decode, gradient of the codes, both matrices), most of these from the cache. `[batch, d_sae]` is never
written, except as candidates in small dictionaries and in chunks for a k of thousands. Only `select_above` and updates
of rows above 8,192 numbers wait for the device. Atomics only count and never add values, so sums repeat bit for bit.

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
    with torch.cuda.device_of(x):
        pattern, values = largest_of_batch(x, encoder, bias, count)
        return Selection(pattern, values, *_in_subset(x, encoder, bias, subset))


def select_above(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
) -> Selection:
    with torch.cuda.device_of(x):
        return Selection(*above(x.contiguous(), encoder.contiguous(), bias, threshold))


def _in_subset(
    x: Tensor, encoder: Tensor, bias: Tensor, subset: Subset | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """TopK among the subset's encoder rows, which are copied together."""
    if subset is None:
        return None, None
    rows, features = encoder[subset.features], bias[subset.features] + subset.penalty
    return largest_of_rows(x, rows, features, subset.k)
