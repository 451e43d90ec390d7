"""What this machine can do at most, measured: operations and bytes per second; and a step's floor from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sae.kernels.products import product


@dataclass(frozen=True)
class Ceilings:
    """The best of some repeats.

    Attributes:
        flops: floating-point operations per second of a dense product.
        bytes_per_second: memory traffic, read and written, of a copy far larger than the caches.
    """

    flops: float
    bytes_per_second: float


def measure(device: str, dtype: torch.dtype = torch.float32, *, small: bool = False) -> Ceilings:
    """Both, with products of `dtype`; `small` ones take no time, to try what uses them."""
    n = 512 if small else 4096 if device == "cpu" else 16384
    left, right = (torch.randn(n, n if device != "cpu" else 1024, device=device).to(dtype) for _ in range(2))
    out = torch.empty(len(left), len(right), dtype=dtype, device=device)
    operations = 2 * left.numel() * len(right)
    flops = operations / best(lambda: torch.mm(left, right.T, out=out), device)
    if device == "cpu":  # the fastest library counts
        flops = max(flops, operations / best(lambda: product(left, right), device))
    size = 1 << (20 if small else 26 if device == "cpu" else 28)
    source = torch.rand(size, device=device)
    target = torch.empty_like(source)
    return Ceilings(flops, 2 * source.numel() * 4 / best(lambda: target.copy_(source), device))


def floor(ceilings: Ceilings, *, d_in: int, d_sae: int, k: int, batch: int) -> float:
    """Seconds of one TopK or BatchTopK step that does nothing but what it must, one after the other.

    The encoder's product, 2 · batch · d_in · d_sae operations; Adam on both matrices, which reads weight and moments
    and writes them, 24 bytes a weight; and a row of d_in float32 numbers for each of the batch · k pairs four times:
    decoding, the gradient of the codes, and of both matrices. Rows that a cache keeps make the last part smaller, so
    the floor is one of arithmetic and traffic as written, not a bound that nothing can pass.
    """
    product_seconds = 2 * batch * d_in * d_sae / ceilings.flops
    traffic = 24 * 2 * d_in * d_sae + 4 * 4 * batch * k * d_in
    return product_seconds + traffic / ceilings.bytes_per_second


def best(function: Callable[[], object], device: str, repeats: int = 7) -> float:
    """The shortest time in seconds, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
