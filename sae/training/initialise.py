"""Initial weights of a dictionary."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.training.threshold import let_k_fire_

STRONGEST = 16
"""Tokens from which the initial row of a transcoder's decoder is taken."""
_FEATURES = 512
_GAIN_TOKENS = 512


@torch.no_grad()
def initialise_(
    dictionary: Dictionary,
    sample: Float[Tensor, "sample d_in"],
    generator: torch.Generator,
    target: Float[Tensor, "sample d_out"] | None = None,
    k: int | None = None,
    centre: str = "geometric_median",
) -> None:
    """Random unit decoder rows, W_enc = W_decᵀ, biases 0, b_dec = the centre of the targets.

    Gao et al. 2024, appendix A.1. In a transcoder the random directions are the encoder's, decoder rows are the
    `responses_` to them, and W_skip is 0. In a crosscoder whose decoder norms are kept, the directions then get the
    sums of norms that they are kept at, and the encoder is scaled by the inverse.

    Args:
        sample: inputs, normalised.
        target: the reconstruction target of each input; None: the inputs.
        k: initial features per token, if the architecture has a penalty; None: biases and thresholds stay 0.
        centre: one of `CENTRES`.
    """
    directions = torch.randn(dictionary.d_sae, dictionary.d_in, generator=generator).to(dictionary.W_enc)
    directions /= directions.norm(dim=-1, keepdim=True)
    dictionary.W_enc.copy_(directions.T)
    for name in dictionary.bias_names:
        dictionary.get_parameter(name).zero_()
    target = sample if target is None else target
    dictionary.b_dec.copy_(CENTRES[centre](target))
    if dictionary.frame.d_out is None:
        dictionary.W_dec.copy_(directions)
        if dictionary.is_crosscoder and dictionary.unit_decoder:
            dictionary.normalise_decoder_()
    else:
        responses_(dictionary, sample, target, generator)
    if dictionary.W_skip is not None:
        dictionary.W_skip.zero_()
    if k is not None and dictionary.penalty is not None:
        let_k_fire_(dictionary, sample, k)


@torch.no_grad()
def responses_(
    dictionary: Dictionary, sample: Float[Tensor, "sample d_in"], target: Float[Tensor, "sample d_out"],
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Decoder row j = the mean target of the tokens on which encoder direction j responds most, at norm 1.

    Targets are relative to their mean, and the tokens are `STRONGEST` of the sample, or an eighth of it if that is
    fewer. A row that would be 0 is random. Training is then ahead of training from decoder rows that are the encoder's,
    or that are random (docs/log.md), and needs no equal widths.
    """
    count = min(STRONGEST, -(-len(sample) // 8))
    centred = target - target.mean(0)
    for start in range(0, dictionary.d_sae, _FEATURES):
        features = slice(start, start + _FEATURES)
        strongest = (dictionary.W_enc.T[features] @ sample.T).topk(count).indices
        rows = centred[strongest].mean(1)
        is_zero = rows.norm(dim=-1, keepdim=True) == 0
        if bool(is_zero.any()):
            rows = rows.where(~is_zero, torch.randn(rows.shape, generator=generator).to(rows))
        dictionary.W_dec[features] = rows / rows.norm(dim=-1, keepdim=True)


@torch.no_grad()
def gain(
    dictionary: Dictionary, sample: Float[Tensor, "sample d_in"], target: Float[Tensor, "sample d_out"]
) -> Float[Tensor, ""]:
    """How much of its features' pre-activations a dictionary finds in the targets: Σ f ⟨y − b_dec, w⟩ / Σ f z.

    w is a decoder row, f = ReLU(z + b_enc), and the sums are over features and tokens. For an SAE it counts as 1, which
    it is if the encoder is the decoder.
    """
    if dictionary.frame.d_out is None:
        return dictionary.b_dec.new_ones(())
    x, y = sample[:_GAIN_TOKENS] - dictionary.centre, target[:_GAIN_TOKENS] - dictionary.b_dec
    features = (x @ dictionary.W_enc + dictionary.b_enc).relu()
    found, read = ((features @ rows) * side for rows, side in ((dictionary.W_dec, y), (dictionary.W_enc.T, x)))
    return found.sum() / read.sum().clamp_min(torch.finfo(read.dtype).tiny)


@torch.no_grad()
def in_frame(dictionary: Dictionary, frame: Frame, like: Tensor) -> Dictionary:
    """An equal copy with another frame, on the device and with the dtype of `like`.

    One without a skip connection gets one of 0; of b_dec, which a transcoder does not subtract from its input, the
    encoder's bias takes over the part.
    """
    dictionary = copy.deepcopy(dictionary).to(like.device, like.dtype)
    was_centred, is_centred = dictionary.frame.d_out is None, frame.d_out is None
    if was_centred != is_centred:
        shift = dictionary.b_dec.double() @ dictionary.W_enc.double()
        dictionary.shift_pre_activations_((shift if is_centred else -shift).to(dictionary.dtype))
    if frame.skip and dictionary.W_skip is None:
        dictionary.W_skip = nn.Parameter(dictionary.b_dec.new_zeros(dictionary.d_in, dictionary.d_out))
    dictionary.frame = frame
    return dictionary


@torch.no_grad()
def take_over_(dictionary: Dictionary, start: Dictionary, sample: Float[Tensor, "sample d_in"], k: int) -> None:
    """Copy the weights of another dictionary of the same shape and frame, in the units of the sample.

    If its architecture differs, the copied weights are the encoder (Gated's with its gain), the decoder, their biases,
    and the skip connection. If the architecture has a penalty, k features per token are then let through, as in a new
    dictionary. If training keeps decoder rows at norm 1, they are normalised, and activations take over the norms.
    """
    same_architecture = start.architecture == dictionary.architecture
    if same_architecture:
        dictionary.load_state_dict(start.state_dict())
    else:
        encoder, bias = start.magnitude_encoder(start.W_enc.T, slice(None))
        dictionary.W_enc.copy_(encoder.T)
        dictionary.W_dec.copy_(start.W_dec)
        dictionary.b_dec.copy_(start.b_dec)
        if dictionary.W_skip is not None and start.W_skip is not None:
            dictionary.W_skip.copy_(start.W_skip)
        for name in dictionary.bias_names:
            dictionary.get_parameter(name).copy_(bias)
    if dictionary.unit_decoder:
        dictionary.normalise_decoder_()
    if not same_architecture and dictionary.penalty is not None:
        let_k_fire_(dictionary, sample, k)


def geometric_median(points: Float[Tensor, "sample d"], iterations: int = 50) -> Float[Tensor, " d"]:
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
