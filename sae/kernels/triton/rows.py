"""TopK's selection from the encoder's product in a buffer: one program per row, and a bound that never misses.

The k-th largest of the maxima of groups of features is reached by at least k features. It is found by bisection, and a
second pass over the row reads only the groups that reach it. A row of which too many do is searched exactly.
"""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.triton.strategies import is_interpreted, rows_at_once
from sae.kernels.triton.tiles import kth_largest, ordered, power_of_two
from sae.kernels.triton.topk import select_candidates

MOST_GROUPS = 4096
"""Most groups of features in a row, and most features that one program keeps in its registers."""
LARGEST_K = MOST_GROUPS // 2
"""Largest k for these kernels."""


@triton.jit
def _pre_activations(product, bias, row, columns, inside, d_sae):
    """The numbers of a row at some columns."""
    pre = tl.load(product + row * d_sae + columns, mask=inside, other=0.0)
    return pre + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _few_features_kernel(product, bias, values, features, d_sae, k, BLOCK: tl.constexpr):
    """The k largest of a row of few features, ascending by feature; ties go to the lower features."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d_sae
    pre = _pre_activations(product, bias, row, columns, inside, d_sae)
    key = ordered(pre)
    bound = kth_largest(key, inside, k).to(tl.int32)
    above = inside & (key > bound)
    equal = (inside & (key == bound)).to(tl.int32)
    kept = above | ((equal > 0) & (tl.cumsum(equal, 0) <= k - tl.sum(above.to(tl.int32), 0)))
    at = row * k + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(values + at, pre, mask=kept)
    tl.store(features + at, columns.to(tl.int64), mask=kept)


@triton.jit
def _reaching(product, bias, row, bound, d_sae, BLOCK: tl.constexpr):
    """How many of a row's numbers, as ordered integers, reach the bound."""
    count = tl.zeros((), tl.int32)
    for start in range(0, d_sae, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < d_sae
        key = ordered(_pre_activations(product, bias, row, columns, inside, d_sae)).to(tl.int64)
        count += tl.sum((inside & (key >= bound)).to(tl.int32), 0)
    return count


@triton.jit
def _candidates_kernel(product, bias, counts, values, features, d_sae, k, capacity, GROUPS: tl.constexpr):
    """Candidates of a row, ascending by feature: at least k, at most `capacity`, the k largest among them.

    Features of a group are GROUPS apart. The bound has the upper 16 bits of the k-th largest maximum.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, GROUPS)
    largest = tl.full((GROUPS,), -2147483648, tl.int32)
    for start in range(0, d_sae, GROUPS):
        columns = start + lanes
        inside = columns < d_sae
        key = ordered(_pre_activations(product, bias, row, columns, inside, d_sae))
        largest = tl.maximum(largest, tl.where(inside, key, -2147483648))
    bound = (kth_largest(largest >> 16, lanes < d_sae, k, BITS=16) * 65536).to(tl.int32)
    reach = largest >= bound
    written = tl.zeros((), tl.int32)
    for start in range(0, d_sae, GROUPS):
        columns = start + lanes
        inside = reach & (columns < d_sae)
        pre = _pre_activations(product, bias, row, columns, inside, d_sae)
        chosen = (inside & (ordered(pre) >= bound)).to(tl.int32)
        place = written + tl.cumsum(chosen, 0) - 1
        kept = (chosen > 0) & (place < capacity)
        tl.store(values + row * capacity + place, pre, mask=kept)
        tl.store(features + row * capacity + place, columns, mask=kept)
        written += tl.sum(chosen, 0)
    if written > capacity:
        low = tl.full((), -2147483648, tl.int64)
        high = tl.full((), 2147483647, tl.int64)
        for _ in range(32):
            middle = (low + high + 1) >> 1
            enough = _reaching(product, bias, row, middle, d_sae, GROUPS) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        ties_left = k - _reaching(product, bias, row, low + 1, d_sae, GROUPS)
        written = tl.zeros((), tl.int32)
        for start in range(0, d_sae, GROUPS):
            columns = start + lanes
            inside = columns < d_sae
            pre = _pre_activations(product, bias, row, columns, inside, d_sae)
            key = ordered(pre).to(tl.int64)
            tie = (inside & (key == low)).to(tl.int32)
            chosen = (inside & (key > low)) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties_left))
            place = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
            tl.store(values + row * capacity + place, pre, mask=chosen)
            tl.store(features + row * capacity + place, columns, mask=chosen)
            ties_left -= tl.sum(tie, 0)
            written += tl.sum(chosen.to(tl.int32), 0)
    tl.store(counts + row, written)


def products(x: Tensor, encoder: Tensor) -> Iterator[tuple[int, Tensor]]:
    """x · encoderᵀ in float32, some rows at a time: number of the first, and a buffer that the next ones overwrite."""
    rows = rows_at_once(x, len(encoder))
    buffer = x.new_empty(min(rows, len(x)), len(encoder), dtype=torch.float32)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        out = buffer[: len(part)]
        multiply(part, encoder, out)
        yield start, out


def multiply(x: Tensor, encoder: Tensor, out: Tensor) -> None:
    """Store x · encoderᵀ, summed in float32 and not rounded."""
    if x.dtype == torch.float32:
        torch.mm(x, encoder.T, out=out)
    elif x.device.type == "cpu":  # which has no such product
        torch.mm(x.float(), encoder.T.float(), out=out)
    else:
        torch.mm(x, encoder.T, out_dtype=torch.float32, out=out)


def largest_from_buffer(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row of x · encoderᵀ + bias, `[batch, k]`, and their features, ascending; k ≤ LARGEST_K."""
    d_sae, batch = len(encoder), len(x)
    groups = number_of_groups(x, k)
    values = x.new_empty(batch, k, dtype=torch.float32)
    features = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    if d_sae <= max(groups, _features_in_registers(x)):
        block = power_of_two(d_sae)
        for start, product in products(x, encoder):
            _few_features_kernel[(len(product),)](
                product, bias, values[start:], features[start:], d_sae, k, BLOCK=block, num_warps=_warps(block)
            )
        return values, features
    capacity = max(64, power_of_two(2 * k))
    counts = torch.empty(batch, dtype=torch.int32, device=x.device)
    candidates = x.new_empty(batch, capacity, dtype=torch.float32)
    where = torch.empty(batch, capacity, dtype=torch.int32, device=x.device)
    for start, product in products(x, encoder):
        _candidates_kernel[(len(product),)](
            product, bias, counts[start:], candidates[start:], where[start:], d_sae, k, capacity,
            GROUPS=groups, num_warps=_warps(groups),
        )  # fmt: skip
    select_candidates(counts, candidates, where, values, features)
    return values, features


def number_of_groups(x: Tensor, k: int) -> int:
    """Groups of features in a row: several times k, so that few groups have two of the k largest. Fewer in tests."""
    if is_interpreted(x):
        return max(16, power_of_two(2 * k))
    return min(MOST_GROUPS, max(1024, power_of_two(8 * k)))


def _features_in_registers(x: Tensor) -> int:
    return 64 if is_interpreted(x) else MOST_GROUPS


def _warps(block: int) -> int:
    return 4 if block <= 1024 else 8
