"""Initial weights of a dictionary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.training.threshold import let_k_fire_


@torch.no_grad()
def initialise_(
    dictionary: Dictionary,
    sample: Float[Tensor, "sample d_in"],
    generator: torch.Generator,
    target: Float[Tensor, "sample d_in"] | None = None,
    k: int | None = None,
    centre: str = "geometric_median",
) -> None:
    """Random unit decoder rows, W_enc = W_decᵀ, biases 0, b_dec = the centre of the targets.

    Gao et al. 2024, appendix A.1. If the target is not the input, the encoder's bias compensates for b_dec, so that
    pre-activations are those of x − (the centre of x).

    Args:
        sample: inputs, normalised.
        target: the reconstruction target of each input; None: the inputs.
        k: initial features per token, if the architecture has a penalty; None: biases and thresholds stay 0.
        centre: one of `CENTRES`.
    """
    dictionary.W_dec.copy_(torch.randn(dictionary.d_sae, dictionary.d_in, generator=generator))
    dictionary.normalise_decoder_()
    dictionary.W_enc.copy_(dictionary.W_dec.T)
    for name in dictionary.bias_names:
        dictionary.get_parameter(name).zero_()
    dictionary.b_dec.copy_(CENTRES[centre](sample if target is None else target))
    if target is not None and target is not sample:
        dictionary.shift_pre_activations_((dictionary.b_dec - CENTRES[centre](sample)) @ dictionary.W_enc)
    if k is not None and dictionary.penalty is not None:
        let_k_fire_(dictionary, sample, k)


@torch.no_grad()
def take_over_(dictionary: Dictionary, start: Dictionary, sample: Float[Tensor, "sample d_in"], k: int) -> None:
    """Copy the weights of another dictionary of the same shape, in the units of the sample.

    If its architecture differs, the copied weights are the encoder (Gated's with its gain), the decoder, and their
    biases. If the architecture has a penalty, k features per token are then let through, as in a new dictionary. If
    training keeps decoder rows at norm 1, they are normalised, and activations take over the norms.
    """
    same_architecture = start.architecture == dictionary.architecture
    if same_architecture:
        dictionary.load_state_dict(start.state_dict())
    else:
        encoder, bias = start.magnitude_encoder(start.W_enc.T, slice(None))
        dictionary.W_enc.copy_(encoder.T)
        dictionary.W_dec.copy_(start.W_dec)
        dictionary.b_dec.copy_(start.b_dec)
        for name in dictionary.bias_names:
            dictionary.get_parameter(name).copy_(bias)
    if dictionary.unit_decoder:
        dictionary.normalise_decoder_()
    if not same_architecture and dictionary.penalty is not None:
        let_k_fire_(dictionary, sample, k)


def geometric_median(points: Float[Tensor, "sample d_in"], iterations: int = 50) -> Float[Tensor, " d_in"]:
    """The point with the smallest sum of distances to all points, by Weiszfeld's iteration in float64.

    If the estimate falls on a point, that point gets a large finite weight instead of a division by zero.
    """
    points = points.double()
    median = points.mean(0)
    smallest = 1e-12 * points.norm(dim=-1).mean().clamp_min(1e-300)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=-1).clamp_min(smallest)
        median = weights @ points / weights.sum()
    return median.float()


CENTRES: dict[str, Callable[[Tensor], Tensor]] = {
    "geometric_median": geometric_median,
    "mean": lambda points: points.double().mean(0).float(),
    "zeros": lambda points: points.new_zeros(points.shape[1]),
}
"""Initial values of b_dec, by name."""
