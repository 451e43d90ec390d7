"""Rows of several tensors, indexed together, without a copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor


class JoinedRows:
    """Rows of contiguous tensors anywhere in memory, as one array of overlapping rows that spans them all.

    Only the places that `places` returns may be used: what lies between them belongs to somebody else.

    Args:
        tensors: of the same width and type, each with at least one row.

    Attributes:
        items: the array, with a row's bytes as an item. It holds the tensors, and so does `tensor`.
        tensor: the same array as rows of numbers.
    """

    def __init__(self, tensors: Sequence[Shaped[Tensor, "_ d_in"]]) -> None:
        width, dtype = tensors[0].shape[1], tensors[0].dtype
        row_bytes = width * dtype.itemsize
        addresses = np.array([tensor.data_ptr() for tensor in tensors])
        first = int(addresses.min())
        step = math.gcd(row_bytes, *(addresses - first).tolist())
        end = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
        self._firsts, self._stride = (addresses - first) // step, row_bytes // step
        count = (end - first - row_bytes) // step + 1
        held = tuple(tensors)
        self.items = np.asarray(_Memory(held, first, (count,), (step,), f"|V{row_bytes}"))
        numbers = torch.from_numpy(np.asarray(_Memory(held, first, (end - first,), (1,), "|u1"))).view(dtype)
        self.tensor = numbers.as_strided((count, width), (step // dtype.itemsize, 1))

    def places(self, number: int, rows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """The places of rows of one of the tensors."""
        return self._firsts[number] + rows * self._stride


class _Memory:
    """A piece of memory, as NumPy asks for it, and what owns parts of it."""

    def __init__(
        self, owners: object, address: int, shape: tuple[int, ...], strides: tuple[int, ...], kind: str
    ) -> None:  # fmt: skip
        self.owners = owners
        self.__array_interface__: dict[str, Any] = {
            "version": 3, "data": (address, False), "shape": shape, "strides": strides, "typestr": kind,
        }  # fmt: skip
