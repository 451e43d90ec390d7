"""Integers in order, on any device: on a CPU by NumPy, which sorts plain numbers several times as fast as PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

_BITS = 63


def places_of(mask: Bool[Tensor, " n"], count: int | None = None) -> Int[Tensor, " places"]:
    """Places at which the mask is True, ascending. Waits for the device unless their number is given."""
    if _is_numpys(mask):
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    if count is None:
        return mask.nonzero()[:, 0]
    return torch.nonzero_static(mask, size=count)[:, 0]


def sort_(numbers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Sort the numbers in place; returns them."""
    if _is_numpys(numbers):
        numbers.numpy().sort()
        return numbers
    return numbers.copy_(numbers.sort().values)


def stable_sort(numbers: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The numbers, all ≥ 0, from the smallest to the largest, and their places; equal numbers stay in their order.

    On a CPU, number and place are sorted as one integer if they fit into 63 bits.
    """
    if _is_numpys(numbers) and len(numbers):
        bits = len(numbers).bit_length()
        if int(numbers.max()).bit_length() + bits <= _BITS:
            pairs = sort_((numbers.long() << bits).add_(torch.arange(len(numbers))))
            return pairs >> bits, pairs.bitwise_and_((1 << bits) - 1)
    numbers, places = numbers.sort(stable=True)
    return numbers, places


def stable_order(numbers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Places of the numbers, all ≥ 0, from the smallest to the largest; equal numbers stay in their order."""
    return stable_sort(numbers)[1]


def run_starts(sorted_numbers: Int[Tensor, " n"]) -> Int[Tensor, " runs"]:
    """Place of the first of each run of equal numbers."""
    begins = torch.ones_like(sorted_numbers, dtype=torch.bool)
    torch.ne(sorted_numbers[1:], sorted_numbers[:-1], out=begins[1:])
    return places_of(begins)


def place_in_run(sorted_numbers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """0, 1, 2, … within each run of equal numbers."""
    starts = run_starts(sorted_numbers)
    places = torch.arange(len(sorted_numbers), device=starts.device)
    return places - _over_runs(starts, starts, len(places))


def lowest_in_runs(numbers: Int[Tensor, " n"], starts: Int[Tensor, " runs"]) -> Int[Tensor, " runs"]:
    """The smallest number of each run, given where runs start; there is at least one."""
    if _is_numpys(numbers):
        return torch.from_numpy(np.minimum.reduceat(numbers.numpy(), starts.numpy()))
    run = _over_runs(torch.arange(len(starts), device=starts.device), starts, len(numbers))
    return numbers[starts].scatter_reduce_(0, run, numbers, "amin")


def _over_runs(one_each: Int[Tensor, " runs"], starts: Int[Tensor, " runs"], n: int) -> Int[Tensor, " n"]:
    """A number for each run, repeated over it."""
    return one_each.repeat_interleave(starts.diff(append=starts.new_full((1,), n)), output_size=n)


def _is_numpys(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
