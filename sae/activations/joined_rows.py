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
    """Rows of contiguous tensors anywhere in memory, as one tensor of overlapping rows that spans them all.

    Only the places that `places` returns may be used: what lies between them belongs to somebody else.

    Args:
        tensors: of the same width and type, each with at least one row.

    Attributes:
        tensor: the rows; it holds the tensors.
    """

    def __init__(self, tensors: Sequence[Shaped[Tensor, "_ d_in"]]) -> None:
        width, dtype = tensors[0].shape[1], tensors[0].dtype
        row_bytes = width * dtype.itemsize
        addresses = np.array([tensor.data_ptr() for tensor in tensors])
        first, end = int(addresses.min()), max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
        step = math.gcd(row_bytes, *(addresses - first).tolist())
        self._firsts, self._stride = (addresses - first) // step, row_bytes // step
        numbers = torch.from_numpy(np.asarray(_Memory(tuple(tensors), first, end - first))).view(dtype)
        rows = (end - first - row_bytes) // step + 1
        self.tensor = numbers.as_strided((rows, width), (step // dtype.itemsize, 1))

    def places(self, number: int, rows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """The places of rows of one of the tensors."""
        return self._firsts[number] + rows * self._stride


class _Memory:
    """A range of bytes, as NumPy asks for it, and what owns parts of it."""

    def __init__(self, owners: object, address: int, count: int) -> None:
        self.owners = owners
        self.__array_interface__: dict[str, Any] = {
            "version": 3, "data": (address, False), "shape": (count,), "typestr": "|u1",
        }  # fmt: skip
