"""Back ends of the sparse core, one interface (`interface.Kernels`): plain reference, CPU, Triton."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import cast

import torch
from torch import Tensor

from sae.kernels.interface import Kernels

BACK_ENDS = {"reference": "sae.kernels.reference", "cpu": "sae.kernels.cpu", "triton": "sae.kernels.triton"}
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(weights: Tensor) -> Kernels:
    """The fastest back end for weights like these: Triton on a GPU if it is installed, else PyTorch's own operators."""
    return back_end(fastest(weights.device.type, weights.dtype))


@cache
def fastest(device: str, dtype: torch.dtype) -> str:
    """Name of the fastest back end that is exact for a dtype; Triton's kernels sum in float32."""
    has_triton = importlib.util.find_spec("triton") is not None
    return "triton" if device == "cuda" and dtype in TRITON_TYPES and has_triton else "cpu"


def is_replayable(device: torch.device, d_in: int) -> bool:
    """Whether a training step on rows of d_in numbers never waits for the device, so that it can be replayed."""
    if fastest(device.type, torch.float32) != "triton":
        return False
    from sae.kernels.triton.update import LARGEST_ROW

    return d_in <= LARGEST_ROW


@cache
def back_end(name: str) -> Kernels:
    """A back end by its name."""
    return cast(Kernels, importlib.import_module(BACK_ENDS[name]))
