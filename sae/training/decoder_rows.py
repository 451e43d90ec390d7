"""Keeps the decoder rows of a crosscoder at Σ_s ‖W_dec,s,j‖ = 1, as the kernels keep those of other dictionaries at 1.

A crosscoder weighs feature j with the sum of its decoder norms over sites: in the penalty (Lindsey et al. 2024), and in
what is selected over a batch (Minder et al. 2025: the largest f_j Σ_s ‖W_dec,s,j‖). With a sum of 1, the weight is in
the activation, and selection, AuxK and thresholds are those of every other dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.sites import site_norms
from sae.kernels.interface import Gradient, Kernels


def tangent(
    kernels: Kernels, rows: Float[Tensor, "d_sae d_out"], gradient: Gradient, widths: Sequence[int]
) -> Gradient:
    """The gradient without the part that would change the sums of norms; as one dense matrix.

    With n the vector of W_s / ‖W_s‖ of all sites that are not 0, which is the gradient of the sum: g − (g·n / n·n) n.
    """
    total = torch.zeros_like(rows) if gradient.dense is None else gradient.dense.clone()
    for term in gradient.terms:
        total += kernels.feature_sums(term)
    for block in gradient.blocks:
        total.index_add_(0, block.features, block.gradient)
    inverse = site_norms(rows, widths).reciprocal()
    inverse = inverse.where(inverse.isfinite(), 0.0)
    parts, changes = rows.split(list(widths), dim=-1), total.split(list(widths), dim=-1)
    products = [(change * part).sum(-1) for change, part in zip(changes, parts, strict=True)]
    along = (torch.stack(products, dim=-1) * inverse).sum(-1) / (inverse > 0).sum(-1).clamp_min(1)
    for site, (change, part) in enumerate(zip(changes, parts, strict=True)):
        change.addcmul_(part, (along * inverse[:, site])[:, None], value=-1)
    return Gradient(dense=total)


def normalise_(rows: Float[Tensor, "d_sae d_out"], widths: Sequence[int]) -> None:
    """Scale rows so that the norms of their sites add up to 1."""
    norms = site_norms(rows, widths).sum(-1, keepdim=True)
    rows /= norms.clamp_min(torch.finfo(rows.dtype).tiny)
