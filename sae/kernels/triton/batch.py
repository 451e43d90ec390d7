"""Selections over the whole batch in the encoder's epilogue: BatchTopK's, and everything above a threshold."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.pattern import Pattern
from sae.kernels.triton.codes import value_gradients
from sae.kernels.triton.tiles import ordered, precision, product_tile, tile_sizes, tiles

SAMPLED = 64
"""Features that the guess looks at in every row."""

ROOM = 2.0
"""Room for candidates, over the number selected."""

SIGMAS = 6.0

HISTOGRAM_TILE = {"BLOCK_B": 32, "BLOCK_F": 64}


@triton.jit
def _append_kernel(
    x, encoder, bias, bound, skip, total, values, places, batch, d_sae, d_in, capacity,
    PER_FEATURE: tl.constexpr, STRICT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Append each number that reaches the bound, and its place row · d_sae + feature; count also those without room."""
    if tl.load(skip) == 0:
        row_blocks = tl.cdiv(batch, BLOCK_B)
        rows = (tl.program_id(0) % row_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
        columns = (tl.program_id(0) // row_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
        pre = product_tile(x, encoder, bias, rows, columns, batch, d_sae, d_in, BLOCK_D, PRECISION)
        inside = (columns < d_sae)[None, :] & (rows < batch)[:, None]
        if PER_FEATURE:
            least = tl.load(bound + columns, mask=columns < d_sae, other=float("inf"))[None, :]
        else:
            least = tl.load(bound) + tl.zeros((1, BLOCK_F), tl.float32)
        if STRICT:  # noqa: SIM108  the compiler wants one of them gone
            chosen = (pre > least) & inside
        else:
            chosen = (ordered(pre) >= ordered(least)) & inside
        number = chosen.to(tl.int32)
        of_rows = tl.sum(number, 1)
        before = tl.atomic_add(total, tl.sum(of_rows, 0))
        place = before + (tl.cumsum(of_rows, 0) - of_rows)[:, None] + tl.cumsum(number, 1) - 1
        chosen = chosen & (place < capacity)
        tl.store(values + place, pre, mask=chosen)
        tl.store(places + place, rows.to(tl.int64)[:, None] * d_sae + columns[None, :], mask=chosen)


@triton.jit
def _histogram_kernel(
    x, encoder, bias, skip, prefix, counts, batch, d_sae, d_in, shift,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Count numbers, as ordered integers from 0 on, that have the prefix, by the byte at `shift` that follows it."""
    if tl.load(skip) == 0:
        row_blocks = tl.cdiv(batch, BLOCK_B)
        rows = (tl.program_id(0) % row_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
        columns = (tl.program_id(0) // row_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
        pre = product_tile(x, encoder, bias, rows, columns, batch, d_sae, d_in, BLOCK_D, PRECISION)
        key = ordered(pre).to(tl.int64) + 2147483648
        inside = (columns < d_sae)[None, :] & (rows < batch)[:, None]
        inside = inside & ((key >> (shift + 8)) == tl.load(prefix))
        byte = ((key >> shift) & 255).to(tl.int32)
        tl.atomic_add(counts + byte, inside.to(tl.int32), mask=inside)


def largest_of_batch(x: Tensor, encoder: Tensor, bias: Tensor, count: int) -> tuple[Pattern, Tensor]:
    """The `count` largest numbers of x · encoderᵀ + bias, of equal ones those that come first."""
    d_sae, device = len(encoder), x.device
    capacity = min(math.ceil(ROOM * count) + 1024, len(x) * d_sae)
    found = _Found(x, encoder, bias, capacity)
    found.append(_guess(x, encoder, bias, count))
    hit = (found.total >= count) & (found.total <= capacity)
    bound = _exact_bound(x, encoder, bias, count, hit.to(torch.int32))
    found.keep_if(hit)
    found.append(bound, skip=hit.to(torch.int32))
    values, places = found.in_order()
    least = values.sort(descending=True).values[count - 1]
    above, equal = values > least, values == least
    room = count - above.sum()
    kept = above | (equal & (equal.cumsum(0) <= room)) | values.isnan()
    to = (kept.cumsum(0) - 1).where(kept, torch.full((), count, device=device)).clamp(max=count)
    chosen_values = values.new_zeros(count + 1).scatter_(0, to, values)[:count]
    chosen_places = places.new_zeros(count + 1).scatter_(0, to, places)[:count]
    starts = torch.arange(len(x) + 1, device=device) * d_sae
    return Pattern(chosen_places % d_sae, torch.searchsorted(chosen_places, starts), d_sae), chosen_values


def above(x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor) -> tuple[Pattern, Tensor]:
    """Every number above its feature's threshold: counted once, for the room, then made again and kept."""
    d_sae = len(encoder)
    counted = _Found(x, encoder, bias, 0)
    counted.append(threshold.float().contiguous(), strict=True)
    found = _Found(x, encoder, bias, int(counted.total))
    found.append(threshold.float().contiguous(), strict=True)
    values, places = found.in_order()
    starts = torch.arange(len(x) + 1, device=x.device) * d_sae
    return Pattern(places % d_sae, torch.searchsorted(places, starts), d_sae), values


class _Found:
    """Numbers found so far, in whatever order programs come to add them."""

    def __init__(self, x: Tensor, encoder: Tensor, bias: Tensor, capacity: int) -> None:
        self.operands, self.capacity = (x, encoder, bias), capacity
        self.nowhere = len(x) * len(encoder)
        self.total = torch.zeros((), dtype=torch.int32, device=x.device)
        self.values = torch.full((max(capacity, 1),), -torch.inf, device=x.device)
        self.places = torch.full((max(capacity, 1),), self.nowhere, dtype=torch.int64, device=x.device)

    def append(self, bound: Tensor, *, strict: bool = False, skip: Tensor | None = None) -> None:
        """Add what reaches (`strict`: exceeds) the bound, one for all or one a feature; nothing where `skip` is 1."""
        x, encoder, bias = self.operands
        sizes = tile_sizes(x)
        skip = torch.zeros((), dtype=torch.int32, device=x.device) if skip is None else skip
        _append_kernel[tiles(len(x), len(encoder), sizes)](
            x, encoder, bias, bound, skip, self.total, self.values, self.places,
            len(x), len(encoder), x.shape[1], self.capacity,
            PER_FEATURE=bound.ndim == 1, STRICT=strict, PRECISION=precision(), **sizes,
        )  # fmt: skip

    def keep_if(self, hit: Tensor) -> None:
        """Drop everything unless `hit`."""
        self.total.mul_(hit)
        self.values.masked_fill_(~hit, -torch.inf)
        self.places.masked_fill_(~hit, self.nowhere)

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Values and places by place; room that was not used comes last."""
        places, order = self.places[: self.capacity].sort()
        return self.values[: self.capacity][order], places


def _guess(x: Tensor, encoder: Tensor, bias: Tensor, count: int) -> Tensor:
    """A bound that `count` numbers most likely reach, and not twice as many, from some features in every row."""
    d_sae = len(encoder)
    sampled = min(SAMPLED, d_sae)
    rows, lanes = torch.arange(len(x), device=x.device)[:, None], torch.arange(sampled, device=x.device)[None, :]
    pattern = Pattern.from_indices((lanes * (d_sae // sampled) + rows * 7919) % d_sae, d_sae)
    values = value_gradients(pattern, x, encoder).float() + bias[pattern.features]
    expected = count * sampled / d_sae
    rank = min(math.ceil(expected + SIGMAS * math.sqrt(expected) + 8), len(values))
    return values.topk(rank, sorted=False).values.min()


def _exact_bound(x: Tensor, encoder: Tensor, bias: Tensor, count: int, skip: Tensor) -> Tensor:
    """Where the guess missed, the count-th largest number of all, a byte at a time; the product is made in each round.

    Where it did not, every kernel returns at once.
    """
    sizes, device = {**tile_sizes(x), **HISTOGRAM_TILE}, x.device
    prefix = torch.zeros((), dtype=torch.int64, device=device)
    left = torch.full((), count, dtype=torch.int64, device=device)
    for shift in (24, 16, 8, 0):
        counts = torch.zeros(256, dtype=torch.int32, device=device)
        _histogram_kernel[tiles(len(x), len(encoder), sizes)](
            x, encoder, bias, skip, prefix, counts, len(x), len(encoder), x.shape[1], shift,
            PRECISION=precision(), **sizes,
        )  # fmt: skip
        reached = counts.flip(0).cumsum(0)
        byte = 255 - (reached < left).sum().clamp(max=255)
        left = left - (reached[255 - byte] - counts[byte])
        prefix = prefix * 256 + byte
    key = (prefix - 2147483648).to(torch.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)
