"""A file in pieces has the bytes of safetensors' own, and is made of the tensors' memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save

from sae.files.tensor_pieces import tensor_pieces

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


@pytest.mark.parametrize("rows", [0, 1, 7, 100])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_bytes_are_those_of_the_library(rows: int, dtype: torch.dtype) -> None:
    """For the tensors of a shard; and for rows of a larger tensor, whose last ones are not in use."""
    activations, scale = (100 * torch.randn(100, 13)).to(dtype), torch.rand(100)
    for tensors in ({"activations": activations[:rows]}, {"activations": activations[:rows], "scale": scale[:rows]}):
        assert b"".join(tensor_pieces(tensors)) == save(tensors)


@pytest.mark.parametrize("first", range(4))
def test_tensors_are_in_the_library_s_order(first: int) -> None:
    """By type, then by name, in whatever order they are given."""
    types = TYPES[first:] + TYPES[:first]
    cases = itertools.product("zaé", enumerate(types))
    tensors = {f"{name}{n}": torch.ones(n + 1, 3, dtype=dtype) for name, (n, dtype) in cases}
    assert b"".join(tensor_pieces(tensors)) == save(tensors)


def test_pieces_are_small_and_share_the_tensor_s_memory() -> None:
    x = torch.zeros(3_000_000)
    pieces = tensor_pieces({"activations": x})
    assert len(pieces) == 1 + 3
    assert max(map(len, pieces)) == 1 << 22
    x[-1] = 1.0
    assert bytes(pieces[-1][-4:]) == b"\x00\x00\x80\x3f"  # 1.0, little-endian
