"""A pseudorandom number for each firing, determined by purpose, seed, row and feature alone: the same on any device."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from sae.numerics import seeding


def random_keys(
    feature: Int[Tensor, " firings"], row: Int[Tensor, " firings"], purpose: str, seed: int
) -> Int[Tensor, " firings"]:
    """A pseudorandom int32 for each firing."""
    return firing_keys(row_keys(row, purpose, seed), feature)


def row_keys(row: Int[Tensor, " rows"], purpose: str, seed: int) -> Int[Tensor, " rows"]:
    """The part of a firing's number that depends on its row."""
    key = seeding.number(purpose, seed)
    row = row.long() + _signed(key, 64)
    return _mix((row ^ (row >> 32)).int()) ^ _signed(key >> 32, 32)


def firing_keys(row_key: Int[Tensor, " firings"], feature: Int[Tensor, " firings"]) -> Int[Tensor, " firings"]:
    """Numbers of firings from those of their rows.

    Their order as signed integers is that of the hash as an unsigned one.
    """
    return _mix((feature.int() * _signed(0x9E3779B1, 32)).bitwise_xor_(row_key)).bitwise_xor_(_signed(1 << 31, 32))


def _mix(x: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Spread each input bit over all 32 output bits (the finaliser of MurmurHash3). Int32 products wrap around."""
    x = (x ^ _shifted(x, 16)).mul_(_signed(0x85EBCA6B, 32))
    x = x.bitwise_xor_(_shifted(x, 13)).mul_(_signed(0xC2B2AE35, 32))
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Int[Tensor, " n"], bits: int) -> Int[Tensor, " n"]:
    """The int32 shifted right as if it were unsigned."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _signed(number: int, bits: int) -> int:
    """The signed integer with the same bits."""
    return number - (1 << bits) if number >> (bits - 1) else number
