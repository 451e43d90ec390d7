"""Selections over the whole batch: BatchTopK's, and everything above a threshold."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.interface import NOTHING
from sae.kernels.pattern import Pattern
from sae.kernels.triton.rows import products
from sae.kernels.triton.strategies import FUSED, is_interpreted, strategy
from sae.kernels.triton.tiles import (
    MISS,
    binomial_below,
    claim,
    ordered,
    power_of_two,
    precision,
    product_tile,
    tile_sizes,
    tiles,
)

SAMPLED = 64
"""Number of features per row in the sample for the guess."""

SAMPLE_ROWS = 16
"""Rows that share the features of their samples, so that the sample is a product of matrices."""

PAIRS_PER_ROW = 128
"""Pairs per row for which there is room before the number above a threshold is known."""

PROGRAMS = 1024
"""Programs that share the tiles of a pass that usually has nothing to do; this few cost almost nothing."""

HISTOGRAM_TILE = {"BLOCK_B": 32, "BLOCK_F": 64}


@dataclass(frozen=True)
class Plan:
    """Plan for finding the batch's candidates.

    Attributes:
        sampled: number of features in the sample, per row.
        rank: the guess is the rank-th largest number of the sample.
        capacity: largest number of candidates.
    """

    sampled: int
    rank: int
    capacity: int


@cache
def plan(batch: int, d_sae: int, count: int) -> Plan:
    """Plan for which the guess gives at least `count` and at most `capacity` candidates, each up to a chance of `MISS`.

    If the sample is independent of the values, Bin(count − 1, share) of the count − 1 largest numbers are in it. Fewer
    than `count` numbers reach the guess only if that count is at least `rank`. More than `capacity` do only if
    Bin(capacity, share) is below `rank`. Features that fire on most rows make misses more frequent, because
    `SAMPLE_ROWS` rows share theirs; a miss costs time and changes no result.
    """
    sampled = min(SAMPLED, d_sae)
    share, numbers = sampled / d_sae, batch * d_sae

    def first(low: int, high: int, holds: Callable[[int], bool]) -> int:
        """The smallest number from low to high for which `holds` is true, given that it stays true above it."""
        return low + bisect_left(range(low, high), True, key=holds)

    rank = first(1, batch * sampled, lambda r: 1 - binomial_below(count - 1, share, r) < MISS)
    capacity = first(count, numbers, lambda n: binomial_below(n, share, rank) < MISS)
    return Plan(sampled, rank, min(capacity + 1024, numbers))


@triton.jit
def _append_kernel(
    x, encoder, bias, bound, skip, totals, values, places, batch, d_sae, d_in, ties_from, capacity,
    PER_FEATURE: tl.constexpr, STRICT: tl.constexpr, TIES_APART: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Append each number that reaches the bound, and its place row · d_sae + feature; also count those beyond capacity.

    TIES_APART: numbers equal to the bound fill the buffer from its end down to place `ties_from`, so that they never
    displace a larger number, however many they are.
    """
    if tl.load(skip) == 0:
        all_tiles = tl.cdiv(batch, BLOCK_B) * tl.cdiv(d_sae, BLOCK_F)
        for tile in range(tl.program_id(0), all_tiles, tl.num_programs(0)):
            rows, columns, inside, pre = product_tile(
                x, encoder, bias, tile, batch, d_sae, d_in, BLOCK_B, BLOCK_F, BLOCK_D, PRECISION
            )
            if PER_FEATURE:
                least = tl.load(bound + columns, mask=columns < d_sae, other=float("inf"))[None, :]
            else:
                least = tl.load(bound) + tl.zeros((1, BLOCK_F), tl.float32)
            if STRICT:
                chosen = ((pre > least) | (pre != pre)) & inside  # noqa: PLR0124  not a number
            elif TIES_APART:
                chosen = (ordered(pre) > ordered(least)) & inside
            else:
                chosen = (ordered(pre) >= ordered(least)) & inside
            flat = rows.to(tl.int64)[:, None] * d_sae + columns[None, :]
            at = claim(totals, chosen)
            kept = chosen & (at < capacity)
            tl.store(values + at, pre, mask=kept)
            tl.store(places + at, flat, mask=kept)
            if TIES_APART:
                tied = (ordered(pre) == ordered(least)) & inside
                at = capacity - 1 - claim(totals + 1, tied)
                kept = tied & (at >= ties_from)
                tl.store(values + at, pre, mask=kept)
                tl.store(places + at, flat, mask=kept)


@triton.jit
def _append_from_buffer_kernel(
    product, bias, bound, totals, values, places, first_row, rows, d_sae, capacity,
    PER_FEATURE: tl.constexpr, STRICT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_append_kernel` without TIES_APART, from the product of some rows."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_sae
    offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if PER_FEATURE:
        least = tl.load(bound + columns, mask=inside, other=float("inf"))
    else:
        least = tl.load(bound) + tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(ROWS):  # pyright: ignore[reportGeneralTypeIssues]
        row = tl.program_id(0) * ROWS + number
        there = columns < tl.where(row < rows, d_sae, 0)
        pre = tl.load(product + row.to(tl.int64) * d_sae + columns, mask=there, other=0.0) + offset
        if STRICT:  # noqa: SIM108
            chosen = ((pre > least) | (pre != pre)) & there  # noqa: PLR0124  not a number
        else:
            chosen = (ordered(pre) >= ordered(least)) & there
        count = tl.sum(chosen.to(tl.int32), 0)
        if count > 0:
            before = tl.atomic_add(totals, count.to(tl.int64), sem="relaxed")
            at = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
            kept = chosen & (at < capacity)
            tl.store(values + at, pre, mask=kept)
            tl.store(places + at, (first_row + row).to(tl.int64) * d_sae + columns, mask=kept)


@triton.jit
def _sample_kernel(
    x, encoder, bias, out, batch, d_sae, d_in, sampled, stride,
    ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some numbers of ROWS rows, at features that differ from program to program, `[batch, sampled]`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK_F)
    features = (lanes * stride + tl.program_id(0) * 7919) % d_sae
    total = tl.zeros((ROWS, BLOCK_F), tl.float32)
    for start in range(0, d_in, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        left = tl.load(
            x + rows.to(tl.int64)[:, None] * d_in + inner[None, :],
            mask=(rows < batch)[:, None] & (inner < d_in)[None, :],
            other=0.0,
        )
        right = tl.load(
            encoder + features.to(tl.int64)[None, :] * d_in + inner[:, None],
            mask=(lanes < sampled)[None, :] & (inner < d_in)[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    pre = total + tl.load(bias + features).to(tl.float32)[None, :]
    tl.store(
        out + rows.to(tl.int64)[:, None] * sampled + lanes[None, :], pre,
        mask=(rows < batch)[:, None] & (lanes < sampled)[None, :],
    )  # fmt: skip


@triton.jit
def _histogram_kernel(
    x, encoder, bias, skip, prefix, counts, batch, d_sae, d_in, shift,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Histogram, by the byte at `shift`, of the numbers (as ordered integers ≥ 0) that start with the prefix."""
    if tl.load(skip) == 0:
        all_tiles = tl.cdiv(batch, BLOCK_B) * tl.cdiv(d_sae, BLOCK_F)
        for tile in range(tl.program_id(0), all_tiles, tl.num_programs(0)):
            _, _, inside, pre = product_tile(
                x, encoder, bias, tile, batch, d_sae, d_in, BLOCK_B, BLOCK_F, BLOCK_D, PRECISION
            )
            key = ordered(pre).to(tl.int64) + 2147483648
            inside = inside & ((key >> (shift + 8)) == tl.load(prefix))
            byte = ((key >> shift) & 255).to(tl.int32)
            tl.atomic_add(counts + byte, inside.to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def _next_byte_kernel(skip, counts, prefix, left, bound):
    """The next byte of the bound from the histogram, which is cleared: the `left`-th largest number has it."""
    if tl.load(skip) == 0:
        lanes = tl.arange(0, 256)
        number = tl.load(counts + 255 - lanes)  # of the largest byte first
        wanted = tl.load(left)
        larger = tl.minimum(tl.sum((tl.cumsum(number, 0) < wanted).to(tl.int32), 0), 255)
        start = tl.load(prefix) * 256 + 255 - larger
        tl.store(prefix, start)
        tl.store(left, wanted - tl.sum(tl.where(lanes < larger, number, 0), 0))
        tl.store(counts + lanes, tl.zeros((256,), tl.int64))
        key = (start - 2147483648).to(tl.int32)  # of the number itself after the last byte
        tl.store(bound, (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


def largest_of_batch(x: Tensor, encoder: Tensor, bias: Tensor, count: int) -> tuple[Pattern, Tensor]:
    """The `count` largest numbers of x · encoderᵀ + bias; ties go to those that come first.

    (If the guess misses and more numbers equal the smallest than fit into the buffer, ties are chosen arbitrarily.)
    """
    d_sae, device = len(encoder), x.device
    scheme = plan(len(x), d_sae, count)
    found = _Found(x, encoder, bias, scheme.capacity)
    found.append(_guess(x, encoder, bias, scheme))
    hit = (found.totals[0] >= count) & (found.totals[0] <= scheme.capacity)
    skip = hit.to(torch.int32)
    bound = _exact_bound(x, encoder, bias, count, skip)
    found.keep_if(hit)
    found.append(bound, skip=skip, ties_from=count)
    values, places = found.in_order()
    least = values.sort(descending=True).values[count - 1]
    above, equal = values > least, values == least
    kept = above | (equal & (equal.cumsum(0) <= count - above.sum())) | values.isnan()
    to = (kept.cumsum(0) - 1).where(kept, torch.full((), count, device=device)).clamp(max=count)
    chosen_values = values.new_zeros(count + 1).scatter_(0, to, values)[:count]
    chosen_places = places.new_zeros(count + 1).scatter_(0, to, places)[:count]
    return Pattern.from_places(chosen_places, len(x), d_sae), chosen_values


def above(
    x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, capacity: int | None = None
) -> tuple[Pattern, Tensor, Tensor]:
    """Every number above its feature's threshold: pattern, values, and how many there are.

    With a capacity, the pattern has this many pairs: those that are there, and padding. Without one, it has as many as
    there are, and if they are more than `PAIRS_PER_ROW` on average, they are found in a second pass.
    """
    bound, shape = threshold.float().contiguous(), (len(x), len(encoder))
    room = min(PAIRS_PER_ROW * len(x), len(x) * len(encoder)) if capacity is None else capacity
    found = _Found(x, encoder, bias, room, NOTHING)
    found.append(bound, strict=True)
    if capacity is not None:
        values, places = found.in_order()
        return Pattern.from_places(places, *shape, is_padded=True), values, found.totals[0]
    count = int(found.totals[0])
    if count > room:
        found = _Found(x, encoder, bias, count)
        found.append(bound, strict=True)
    values, places = found.in_order(count)
    return Pattern.from_places(places, *shape), values, found.totals[0]


class _Found:
    """Numbers found so far, in the arbitrary order in which programs add them; `unused` is the value of the others."""

    def __init__(self, x: Tensor, encoder: Tensor, bias: Tensor, capacity: int, unused: float = -torch.inf) -> None:
        self.operands, self.capacity = (x, encoder, bias), capacity
        self.nowhere = len(x) * len(encoder)
        self.totals = torch.zeros(2, dtype=torch.int64, device=x.device)
        self.values = torch.full((max(capacity, 1),), unused, device=x.device)
        self.places = torch.full((max(capacity, 1),), self.nowhere, dtype=torch.int64, device=x.device)

    def append(self, bound: Tensor, *, strict: bool = False, skip: Tensor | None = None, ties_from: int = 0) -> None:
        """Add the numbers that reach (`strict`: exceed) the bound, shared or one per feature.

        Args:
            bound: the bound.
            strict: numbers must exceed the bound, not only reach it.
            skip: 1 to add nothing. If given, numbers equal to the bound are kept apart from the others.
            ties_from: the first place that numbers kept apart may fill.
        """
        x, encoder, bias = self.operands
        if skip is None and strategy("above" if strict else "batch", len(encoder)) != FUSED:
            self._append_from_buffer(bound, strict=strict)
            return
        programs = tiles(len(x), len(encoder), tile_sizes(x))
        never = torch.zeros((), dtype=torch.int32, device=x.device)
        _append_kernel[(programs if skip is None else min(programs, PROGRAMS),)](
            x, encoder, bias, bound, never if skip is None else skip, self.totals, self.values, self.places,
            len(x), len(encoder), x.shape[1], ties_from, self.capacity,
            PER_FEATURE=bound.ndim == 1, STRICT=strict, TIES_APART=skip is not None, PRECISION=precision(),
            **tile_sizes(x),
        )  # fmt: skip

    def _append_from_buffer(self, bound: Tensor, *, strict: bool) -> None:
        x, encoder, bias = self.operands
        rows, block = (2, 64) if is_interpreted(x) else (4, 2048)
        for start, product in products(x, encoder):
            _append_from_buffer_kernel[(triton.cdiv(len(product), rows), triton.cdiv(len(encoder), block))](
                product, bias, bound, self.totals, self.values, self.places, start, len(product), len(encoder),
                self.capacity, PER_FEATURE=bound.ndim == 1, STRICT=strict, ROWS=rows, BLOCK=block, num_warps=8,
            )  # fmt: skip

    def keep_if(self, hit: Tensor) -> None:
        """Drop everything unless `hit`."""
        self.totals.mul_(hit)
        self.values.masked_fill_(~hit, -torch.inf)
        self.places.masked_fill_(~hit, self.nowhere)

    def in_order(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Values and places, of the first `count` or all, sorted by place; unused entries come last."""
        count = self.capacity if count is None else count
        places, order = self.places[:count].sort()
        return self.values[:count][order], places


def _guess(x: Tensor, encoder: Tensor, bias: Tensor, scheme: Plan) -> Tensor:
    """A bound that the largest numbers very likely reach, and few others, from some features in every row."""
    d_sae, sampled = len(encoder), scheme.sampled
    values = x.new_empty(len(x) * sampled, dtype=torch.float32)
    sizes = {"BLOCK_D": 16} if is_interpreted(x) else {"BLOCK_D": 64, "num_warps": 4}
    _sample_kernel[(triton.cdiv(len(x), SAMPLE_ROWS),)](
        x, encoder, bias, values, len(x), d_sae, x.shape[1], sampled, d_sae // sampled,
        ROWS=SAMPLE_ROWS, BLOCK_F=power_of_two(sampled), PRECISION=precision(), **sizes,
    )  # fmt: skip
    return values.topk(scheme.rank, sorted=False).values.min()


def _exact_bound(x: Tensor, encoder: Tensor, bias: Tensor, count: int, skip: Tensor) -> Tensor:
    """If the guess missed: the count-th largest number, one byte per round; every round computes the product again.

    If it did not, every kernel returns at once.
    """
    sizes, device = {**tile_sizes(x), **HISTOGRAM_TILE}, x.device
    prefix = torch.zeros((), dtype=torch.int64, device=device)
    left = torch.full((), count, dtype=torch.int64, device=device)
    counts = torch.zeros(256, dtype=torch.int64, device=device)
    bound = torch.zeros((), device=device)
    for shift in (24, 16, 8, 0):
        _histogram_kernel[(min(tiles(len(x), len(encoder), sizes), PROGRAMS),)](
            x, encoder, bias, skip, prefix, counts, len(x), len(encoder), x.shape[1], shift,
            PRECISION=precision(), **sizes,
        )  # fmt: skip
        _next_byte_kernel[(1,)](skip, counts, prefix, left, bound, num_warps=1)
    return bound
