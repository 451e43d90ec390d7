"""Back ends of the sparse core, one interface (`interface.Kernels`): plain reference, CPU, Numba, Triton."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from functools import cache
from typing import cast

import torch
from torch import Tensor

from sae.kernels.interface import Kernels
from sae.kernels.threads import operators_in_one_thread

BACK_ENDS = {
    "reference": "sae.kernels.reference",
    "cpu": "sae.kernels.cpu",
    "numba": "sae.kernels.numba",
    "triton": "sae.kernels.triton",
}
NUMBA_TYPES = (torch.float32, torch.float64)
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(weights: Tensor) -> Kernels:
    """The fastest back end for weights like these: Triton on a GPU, Numba on a CPU, else PyTorch's own operators."""
    return back_end(fastest(weights.device.type, weights.dtype))


@cache
def fastest(device: str, dtype: torch.dtype) -> str:
    """Name of the fastest installed back end that is exact for a dtype; Triton's kernels sum in float32.

    `SAE_KERNELS=cpu` in the environment leaves Numba out.
    """
    if device == "cuda" and dtype in TRITON_TYPES and importlib.util.find_spec("triton") is not None:
        return "triton"
    wanted = device == "cpu" and dtype in NUMBA_TYPES and os.environ.get("SAE_KERNELS") != "cpu"
    return "numba" if wanted and _has_numba() else "cpu"


@cache
def _has_numba() -> bool:
    """Whether Numba is installed and fits the installed NumPy."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


def operators_beside(weights: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context for a step whose large computations all are the back end's: other operators leave it the cores."""
    with_numba = fastest(weights.device.type, weights.dtype) == "numba"
    return operators_in_one_thread() if with_numba else contextlib.nullcontext()


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


def rounds_products(kernels: Kernels) -> bool:
    """Whether a product of bfloat16 numbers is rounded to bfloat16. Triton's kernels keep sums in float32."""
    return kernels is not sys.modules.get(BACK_ENDS["triton"])
