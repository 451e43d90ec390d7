"""Shared parts of the kernels: a tile of the encoder's product, and numbers as integers of the same order."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae.kernels.triton.strategies import is_interpreted

MISS = 1e-7
"""Chance that a guess gives too few candidates, and that it gives too many."""


@triton.jit
def product_tile(
    x, encoder, bias, tile, batch, d_sae, d_in,
    BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of x · encoderᵀ + bias: its rows and columns, which of its places are in the matrix, the float32 numbers.

    Row blocks change fastest, so that a block of the encoder is read once.
    """
    row_blocks = tl.cdiv(batch, BLOCK_B)
    rows = (tile % row_blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = (tile // row_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    of_rows = (rows < batch)[:, None]
    of_columns = (columns < d_sae)[None, :]
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, d_in, BLOCK_D):
        inner = start + tl.arange(0, BLOCK_D)
        left = tl.load(
            x + rows.to(tl.int64)[:, None] * d_in + inner[None, :], mask=of_rows & (inner < d_in)[None, :], other=0.0
        )
        right = tl.load(
            encoder + columns.to(tl.int64)[None, :] * d_in + inner[:, None],
            mask=of_columns & (inner < d_in)[:, None],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    pre = total + tl.load(bias + columns, mask=columns < d_sae, other=0.0).to(tl.float32)[None, :]
    return rows, columns, of_columns & of_rows, pre


@triton.jit
def ordered(values):
    """float32 as int32 of the same order; a NaN, of either sign, comes after infinity."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)  # noqa: PLR0124


@triton.jit
def claim(counter, chosen):
    """A place for each of a tile's chosen numbers, from one addition to the counter."""
    number = chosen.to(tl.int32)
    of_rows = tl.sum(number, 1)
    before = tl.atomic_add(counter, tl.sum(of_rows, 0).to(tl.int64), sem="relaxed")
    return before + (tl.cumsum(of_rows, 0) - of_rows)[:, None] + tl.cumsum(number, 1) - 1


@triton.jit
def kth_largest(keys, valid, k, BITS: tl.constexpr = 32):
    """The largest t with at least k valid keys ≥ t, by bisection; the smallest integer of BITS if there are fewer."""
    low = tl.full((), -(1 << (BITS - 1)), tl.int64)
    high = tl.full((), (1 << (BITS - 1)) - 1, tl.int64)
    for _ in range(BITS):
        middle = (low + high + 1) >> 1
        enough = tl.sum((valid & (keys >= middle.to(tl.int32))).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def first_features(features, chosen, need):
    """The smallest f with at least `need` chosen features ≤ f, by bisection."""
    low = tl.full((), 0, tl.int64)
    high = tl.full((), 2147483647, tl.int64)
    for _ in range(31):
        middle = (low + high) >> 1
        enough = tl.sum((chosen & (features.to(tl.int64) <= middle)).to(tl.int32), 0) >= need
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return high


def binomial_below(n: int, share: float, limit: int) -> float:
    """P(Bin(n, share) < limit)."""
    if share >= 1:
        return float(n < limit)

    def log_chance(i: int) -> float:
        return (
            math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
            + i * math.log(share) + (n - i) * math.log1p(-share)
        )  # fmt: skip

    return math.fsum(math.exp(log_chance(i)) for i in range(min(limit, n + 1)))


def precision() -> str:
    """How float32 operands are multiplied: exactly, unless PyTorch was told that TF32 will do."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def tile_sizes(x: Tensor) -> dict[str, int]:
    """Tile of the product: rows, columns, inner numbers; and launch options. CPU tensors (tests) get small ones.

    Not tuned on a GPU yet. Larger tiles read less, but the steps after the product then spill out of registers.
    """
    if is_interpreted(x):
        return {"BLOCK_B": 16, "BLOCK_F": 32, "BLOCK_D": 16}
    stages = 3 if major(x) >= 8 else 2  # before Ampere, a program has 64 KiB of shared memory at most
    if x.dtype == torch.float32:
        return {"BLOCK_B": 64, "BLOCK_F": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": stages}
    return {"BLOCK_B": 128, "BLOCK_F": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": stages}


def major(x: Tensor) -> int:
    """The first number of the GPU's compute capability."""
    return torch.cuda.get_device_capability(x.device)[0]


def at_once(x: Tensor) -> int:
    """Number of pairs whose rows a program requests from memory before it waits for the first. Fewer in tests."""
    return 2 if is_interpreted(x) else 4


def tiles(batch: int, d_sae: int, sizes: dict[str, int]) -> int:
    """Number of tiles of the product."""
    return triton.cdiv(batch, sizes["BLOCK_B"]) * triton.cdiv(d_sae, sizes["BLOCK_F"])


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n, and 16 at least."""
    return max(16, 1 << (n - 1).bit_length())
