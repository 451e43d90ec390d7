"""Where training starts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary import Dictionary


@torch.no_grad()
def initialise_(dictionary: Dictionary, sample: Float[Tensor, "sample d_in"], generator: torch.Generator) -> None:
    """Random unit decoder rows, W_enc = W_decᵀ, b_enc = 0, b_dec = the geometric median of `sample`.

    Gao et al. 2024, appendix A.1.
    """
    directions = torch.randn(dictionary.d_sae, dictionary.d_in, generator=generator).to(sample.device)
    dictionary.W_dec.copy_(directions)
    normalise_decoder_(dictionary.W_dec)
    dictionary.W_enc.copy_(dictionary.W_dec.T)
    dictionary.b_enc.zero_()
    dictionary.b_dec.copy_(geometric_median(sample))


def geometric_median(points: Float[Tensor, "sample d_in"], iterations: int = 50) -> Float[Tensor, " d_in"]:
    """The point with the least sum of distances to all points, by Weiszfeld's iteration in float64.

    A point that the estimate falls on gets a large finite weight instead of a division by zero.
    """
    points = points.double()
    median = points.mean(0)
    smallest = 1e-12 * points.norm(dim=-1).mean().clamp_min(1e-300)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=-1).clamp_min(smallest)
        median = weights @ points / weights.sum()
    return median.float()


@torch.no_grad()
def normalise_decoder_(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Give every row norm 1."""
    W_dec /= W_dec.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)
