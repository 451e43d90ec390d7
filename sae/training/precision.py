"""Whether the encoder's large product is computed in bfloat16."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from sae.dictionary.base import Dictionary
from sae.kernels.products import multiplies_bfloat16


def in_bfloat16(dictionary: Dictionary, chosen: str, device: torch.device) -> bool:
    """Whether a new training computes it in bfloat16: if requested, and by default where it is faster.

    Never if features fire above a threshold, because rounding would then decide which do.

    Args:
        dictionary: the dictionary in training.
        chosen: `train.encoder_dtype`.
        device: where it is trained.
    """
    if dictionary.penalty is not None:
        return False
    faster = multiplies_bfloat16(device)
    if chosen == "bfloat16" and not faster:
        warnings.warn(
            "train.encoder_dtype=bfloat16: this processor has no bfloat16 instructions, so float32 is faster",
            stacklevel=2,
        )
    return chosen == "bfloat16" or (chosen == "auto" and faster)


def was_in_bfloat16(dictionary: Dictionary, chosen: str, state: Mapping[str, Any]) -> bool:
    """Whether the training that a state is of did so. Before states recorded it, only a GPU did by default."""
    if dictionary.penalty is not None:
        return False
    if chosen == "auto":
        chosen = "bfloat16" if dictionary.b_dec.device.type == "cuda" else "float32"
    return state.get("encoder_dtype", chosen) == "bfloat16"
