"""Histograms of activations with bins fixed before the data is seen: octaves of a fixed scale, in equal parts.

A bin is the exponent and the leading bits of value / scale: it costs one shift and is the same everywhere.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

LOWEST_OCTAVE, OCTAVES = -12, 16
FINE_PER_OCTAVE, PER_OCTAVE = 16, 4
FINE_BINS, BINS = OCTAVES * FINE_PER_OCTAVE, OCTAVES * PER_OCTAVE
_SHIFT = 23 - 4
_LOWEST = (127 + LOWEST_OCTAVE) * FINE_PER_OCTAVE


def fine_bins(value: Float[Tensor, " n"], scale: float) -> Int[Tensor, " n"]:
    """The fine bin of each positive float32 value; values outside the range fall into the first or the last bin."""
    bits = (value * (1 / scale)).view(torch.int32)
    return (bits >> _SHIFT).sub_(_LOWEST).clamp_(0, FINE_BINS - 1)


def coarsen(histogram: Int[np.ndarray, "d_sae fine"]) -> Int[np.ndarray, "d_sae bins"]:
    """Counts in the stored bins."""
    return histogram.reshape(len(histogram), BINS, FINE_PER_OCTAVE // PER_OCTAVE).sum(-1)


def bin_edges(scale: float) -> Float[np.ndarray, " edges"]:
    """Edges of the stored bins, from scale · 2⁻¹² to scale · 2⁴."""
    octave, part = np.divmod(np.arange(BINS + 1), PER_OCTAVE)
    return scale * 2.0 ** (octave + LOWEST_OCTAVE) * (1 + part / PER_OCTAVE)
