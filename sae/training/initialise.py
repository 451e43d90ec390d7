"""Where training starts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import Gated, JumpReLU, ReLU
from sae.dictionary import Dictionary
from sae.sparse import select_batch_topk


@torch.no_grad()
def initialise_(
    dictionary: Dictionary,
    sample: Float[Tensor, "sample d_in"],
    generator: torch.Generator,
    target: Float[Tensor, "sample d_in"] | None = None,
    k: int | None = None,
) -> None:
    """Random unit decoder rows, W_enc = W_decᵀ, biases 0, b_dec = the geometric median of the targets.

    Gao et al. 2024, appendix A.1. Where the target is not the input, the encoder's bias makes good for b_dec, so that
    pre-activations are those of x − (the median of x). JumpReLU's thresholds begin where k features fire per token.

    Args:
        sample: inputs, normalised.
        target: what is to be reconstructed of each; None: the inputs.
        k: features per token that JumpReLU begins with.
    """
    directions = torch.randn(dictionary.d_sae, dictionary.d_in, generator=generator).to(sample.device)
    dictionary.W_dec.copy_(directions)
    normalise_decoder_(dictionary.W_dec)
    dictionary.W_enc.copy_(dictionary.W_dec.T)
    for name in dictionary.bias_names:
        dictionary.get_parameter(name).zero_()
    dictionary.b_dec.copy_(geometric_median(sample if target is None else target))
    if target is not None and target is not sample:
        dictionary.shift_pre_activations_((dictionary.b_dec - geometric_median(sample)) @ dictionary.W_enc)
    if k is not None and isinstance(dictionary, (ReLU, Gated, JumpReLU)):
        selection = select_batch_topk(sample, dictionary.b_dec, dictionary.W_enc.T, dictionary.b_enc, k)
        bound = selection.values.min().clamp_min(0)
        if isinstance(dictionary, JumpReLU):
            dictionary.threshold.fill_(bound)
        else:
            dictionary.b_enc.sub_(bound)


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
