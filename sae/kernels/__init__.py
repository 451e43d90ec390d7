"""Back ends of the sparse core, one interface (`interface.Kernels`): plain reference, CPU, Triton."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import cast

import torch

from sae.kernels.interface import Kernels

BACK_ENDS = {"reference": "sae.kernels.reference", "cpu": "sae.kernels.cpu", "triton": "sae.kernels.triton"}


def kernels_for(device: torch.device) -> Kernels:
    """The fastest back end on a device: Triton on a GPU where it is installed, else PyTorch's own operators."""
    return back_end("triton" if device.type == "cuda" and _has_triton() else "cpu")


@cache
def back_end(name: str) -> Kernels:
    """A back end by its name."""
    return cast(Kernels, importlib.import_module(BACK_ENDS[name]))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
