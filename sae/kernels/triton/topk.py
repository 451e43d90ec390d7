"""TopK's selection in the epilogue of the encoder's product, so that `[batch, d_sae]` is never written."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.triton.tiles import (
    MISS,
    binomial_below,
    first_features,
    kth_largest,
    ordered,
    power_of_two,
    precision,
    product_tile,
    tile_sizes,
    tiles,
)

LARGEST_ROW = 8192
"""Candidates of a row that one program takes into its registers."""


@dataclass(frozen=True)
class Plan:
    """Plan for finding candidates in rows of d_sae numbers.

    Attributes:
        stride: every stride-th feature is in the sample.
        rank: the guess is the rank-th largest number of the sample; 0: every number is a candidate.
        capacity: largest number of candidates per row.
    """

    stride: int
    rank: int
    capacity: int


@cache
def plan(d_sae: int, k: int) -> Plan | None:
    """Rank and capacity for which a guess gives at least k and at most `capacity` candidates, each up to `MISS`.

    The sample is independent of the values, so Bin(k − 1, 1 / stride) of the k − 1 largest numbers are in it. Fewer
    than k numbers exceed the rank-th of the sample only if that count is at least `rank`. More than `capacity` do only
    if Bin(capacity, 1 / stride) is below `rank`. None: the required capacity is too large.
    """
    stride = max(1, min(32, d_sae // 1024))
    share = 1 / stride
    rank = next((r for r in range(1, k + 1) if 1 - binomial_below(k - 1, share, r) < MISS), k + 1)
    capacity = power_of_two(k)
    while capacity < d_sae and binomial_below(capacity, share, rank) >= MISS:
        capacity *= 2
    if capacity >= d_sae or stride == 1:
        stride, rank, capacity = 1, 0, power_of_two(d_sae)
    return Plan(stride, rank, capacity) if capacity <= LARGEST_ROW else None


@triton.jit
def _guess_kernel(sample, guess, columns, rank, BLOCK: tl.constexpr):
    """Per row the rank-th largest number of the sample."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    values = tl.load(sample + row * columns + place, mask=place < columns, other=0.0)
    bound = kth_largest(ordered(values), place < columns, rank).to(tl.int32)
    bits = bound ^ ((bound >> 31) & 0x7FFFFFFF)
    tl.store(guess + row, bits.to(tl.float32, bitcast=True))


@triton.jit
def _candidates_kernel(
    x, encoder, bias, guess, counts, values, features, batch, d_sae, d_in, capacity,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Append every number that reaches its row's guess to the row's candidates; also count those beyond capacity."""
    rows, columns, inside, pre = product_tile(
        x, encoder, bias, tl.program_id(0), batch, d_sae, d_in, BLOCK_B, BLOCK_F, BLOCK_D, PRECISION
    )
    bound = tl.load(guess + rows, mask=rows < batch, other=float("inf"))
    chosen = ((pre >= bound[:, None]) | (pre != pre)) & inside  # noqa: PLR0124  not a number
    number = chosen.to(tl.int32)
    before = tl.atomic_add(counts + rows, tl.sum(number, 1), mask=rows < batch, sem="relaxed")
    place = before[:, None] + tl.cumsum(number, 1) - 1
    at = rows.to(tl.int64)[:, None] * capacity + place
    chosen = chosen & (place < capacity)
    tl.store(values + at, pre, mask=chosen)
    tl.store(features + at, columns[None, :] + tl.zeros_like(place), mask=chosen)


@triton.jit
def _select_kernel(counts, values, features, chosen_values, chosen_features, k, capacity, BLOCK: tl.constexpr):
    """The k largest candidates of each row; ties go to the lower features."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    if (count >= k) & (count <= capacity):
        place = tl.arange(0, BLOCK)
        valid = place < count
        value = tl.load(values + row * capacity + place, mask=valid, other=0.0)
        feature = tl.load(features + row * capacity + place, mask=valid, other=0)
        key = ordered(value)
        bound = kth_largest(key, valid, k)
        above = valid & (key.to(tl.int64) > bound)
        equal = valid & (key.to(tl.int64) == bound)
        last = first_features(feature, equal, k - tl.sum(above.to(tl.int32), 0))
        kept = above | (equal & (feature.to(tl.int64) <= last))
        to = row * k + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(chosen_values + to, value, mask=kept)
        tl.store(chosen_features + to, feature.to(tl.int64), mask=kept)


@triton.jit
def _row_block(x, encoder, bias, row, columns, d_sae, d_in, BLOCK_D: tl.constexpr):
    """x[row] · encoder[columns]ᵀ + bias[columns] in float32."""
    total = tl.zeros((columns.shape[0],), tl.float32)
    for start in range(0, d_in, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        left = tl.load(x + row * d_in + inner, mask=inner < d_in, other=0.0).to(tl.float32)
        right = tl.load(
            encoder + columns.to(tl.int64)[:, None] * d_in + inner[None, :],
            mask=(columns < d_sae)[:, None] & (inner < d_in)[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(left[None, :] * right, 1)
    return total + tl.load(bias + columns, mask=columns < d_sae, other=0.0).to(tl.float32)


@triton.jit
def _reaching(
    x, encoder, bias, row, bound, d_sae, d_in, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """How many of a row's numbers, as ordered integers, reach the bound."""
    count = tl.zeros((), tl.int32)
    for start in range(0, d_sae, BLOCK_F):
        columns = start + tl.arange(0, BLOCK_F)
        key = ordered(_row_block(x, encoder, bias, row, columns, d_sae, d_in, BLOCK_D)).to(tl.int64)
        count += tl.sum(((key >= bound) & (columns < d_sae)).to(tl.int32), 0)
    return count


@triton.jit
def _exact_row_kernel(
    x, encoder, bias, counts, chosen_values, chosen_features, d_sae, d_in, k, capacity,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows whose guess missed: the k largest by bisection; every round computes the row's numbers again."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    if (count < k) | (count > capacity):
        low = tl.full((), -2147483648, tl.int64)
        high = tl.full((), 2147483647, tl.int64)
        for _ in range(32):
            middle = (low + high + 1) >> 1
            enough = _reaching(x, encoder, bias, row, middle, d_sae, d_in, BLOCK_F, BLOCK_D) >= k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
        ties_left = k - _reaching(x, encoder, bias, row, low + 1, d_sae, d_in, BLOCK_F, BLOCK_D)
        written = tl.zeros((), tl.int32)
        for start in range(0, d_sae, BLOCK_F):
            columns = start + tl.arange(0, BLOCK_F)
            pre = _row_block(x, encoder, bias, row, columns, d_sae, d_in, BLOCK_D)
            key = ordered(pre).to(tl.int64)
            tie = ((key == low) & (columns < d_sae)).to(tl.int32)
            kept = ((key > low) & (columns < d_sae)) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties_left))
            to = row * k + written + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(chosen_values + to, pre, mask=kept)
            tl.store(chosen_features + to, columns.to(tl.int64), mask=kept)
            ties_left -= tl.sum(tie, 0)
            written += tl.sum(kept.to(tl.int32), 0)


def largest_of_rows(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row of x · encoderᵀ + bias, `[batch, k]`, and their features, ascending."""
    scheme = plan(len(encoder), k)
    if scheme is None:
        return by_chunks(x, encoder, bias, k)
    batch, d_in = x.shape
    counts = torch.zeros(batch, dtype=torch.int32, device=x.device)
    candidates = x.new_empty(batch, scheme.capacity, dtype=torch.float32)
    where = torch.empty(batch, scheme.capacity, dtype=torch.int32, device=x.device)
    sizes = tile_sizes(x)
    _candidates_kernel[(tiles(batch, len(encoder), sizes),)](
        x, encoder, bias, guesses(x, encoder, bias, scheme), counts, candidates, where,
        batch, len(encoder), d_in, scheme.capacity, PRECISION=precision(), **sizes,
    )  # fmt: skip
    values = x.new_empty(batch, k, dtype=torch.float32)
    features = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    select_candidates(counts, candidates, where, values, features)
    _exact_row_kernel[(batch,)](
        x, encoder, bias, counts, values, features, len(encoder), d_in, k, scheme.capacity, BLOCK_F=64, BLOCK_D=64
    )
    features, order = features.sort(dim=-1)
    return values.gather(-1, order), features


def select_candidates(
    counts: Tensor, candidates: Tensor, where: Tensor, values: Tensor, features: Tensor
) -> None:  # fmt: skip
    """Store the k largest of each row's candidates, and their features, in the order of the candidates.

    Args:
        counts: number of candidates; rows with fewer than k or more than there is room for are left out.
        candidates: their values, `[batch, capacity]`.
        where: their features.
        values: receives the largest, `[batch, k]`.
        features: receives their features.
    """
    capacity = candidates.shape[1]
    block = power_of_two(capacity)
    _select_kernel[(len(counts),)](
        counts, candidates, where, values, features, values.shape[1], capacity,
        BLOCK=block, num_warps=1 if block <= 128 else 4,
    )  # fmt: skip


def guesses(x: Tensor, encoder: Tensor, bias: Tensor, scheme: Plan) -> Tensor:
    """A bound for every row that its k largest numbers very likely reach."""
    if scheme.rank == 0:
        return torch.full((len(x),), -torch.inf, device=x.device)
    sample = (x @ encoder[:: scheme.stride].T).float() + bias[:: scheme.stride]
    guess = x.new_empty(len(x), dtype=torch.float32)
    columns = sample.shape[1]
    _guess_kernel[(len(x),)](sample, guess, columns, scheme.rank, BLOCK=power_of_two(columns))
    return guess


def by_chunks(x: Tensor, encoder: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For a k of thousands: dense, some rows at a time, summed in float32 like everything else."""
    whole = encoder.float()
    largest = [
        (rows.float() @ whole.T + bias).topk(k, dim=-1, sorted=False)
        for rows in x.split(max(1, (1 << 26) // len(encoder)))
    ]
    return torch.cat([chunk.values for chunk in largest]), torch.cat([chunk.indices for chunk in largest])
