"""A safetensors file as pieces of memory: the bytes that the library makes, without a copy of the tensors.

The library builds the whole file in one call, during which no other thread runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int8: "I8"}
"""Types of stored activations and scales, in the order in which the library puts tensors of different types."""
_ALIGNMENT, _PIECE_BYTES = 8, 1 << 22


def tensor_pieces(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """The file, in order, in pieces of at most 4 MB. They are views of the tensors, which must not change meanwhile.

    Args:
        tensors: contiguous tensors of floating-point numbers or int8, on the CPU.
    """
    types = list(_TYPES)
    ordered = sorted(tensors.items(), key=lambda item: (types.index(item[1].dtype), item[0]))
    header: dict[str, object] = {}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    pieces = [memoryview(len(text).to_bytes(8, "little") + text)]
    for _, tensor in ordered:
        content = tensor.detach().view(-1).view(torch.uint8).numpy().data
        pieces += [content[first : first + _PIECE_BYTES] for first in range(0, len(content), _PIECE_BYTES)]
    return pieces
