"""A dictionary as another toolkit's files state it, and the equal one of this toolkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import BatchTopK, Gated, JumpReLU, MatchingPursuit, ReLU, TopK
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import PLAIN, Frame, InputNorm
from sae.errors import FormatError

CONVERTED = "converted"
"""The entry of a dictionary's metadata that tells which files it comes from, and what was folded or carried."""
_UNIT = 1e-5

Activation = Literal["relu", "jumprelu", "gated", "topk", "batch_topk", "abs_topk", "matching_pursuit"]


@dataclass
class Foreign:
    """f = act((x − centre) W_enc + b_enc),  x̂ = f W_dec + b_dec + x W_skip, in units of their own.

    Attributes:
        format: the format's name, with its version if it has several.
        activation: how features fire. `relu`: if positive; `jumprelu`: above `threshold`; `gated`: by Gated's rule,
            with b_enc as the gate's bias; `topk`: the k largest of a token; `batch_topk`: above one threshold;
            `abs_topk`: the k of the largest magnitude, which keep their sign; `matching_pursuit`: by its rule, with
            `pursuit` as its settings and without b_enc.
        W_enc: `[d_in, d_sae]`.
        b_enc: `[d_sae]`.
        W_dec: `[d_sae, d_out]`.
        b_dec: `[d_out]`.
        centred: whether b_dec is subtracted from the input; otherwise nothing is.
        W_skip: `[d_in, d_out]`, applied to the input as it is given; None: there is none.
        input_norm: what is done to each input by itself, and undone afterwards; see `Frame`.
        k: features per token, of `topk`, `batch_topk` and `abs_topk`.
        threshold: `[d_sae]` of `jumprelu`, `[]` of `batch_topk`.
        b_mag, r_mag: `[d_sae]`, of `gated`.
        input_scale: what the input is multiplied by.
        output_scale: what the reconstruction is divided by; None: the same.
        pursuit: settings of `MatchingPursuit`.
        ranked_by_norm: for `topk`, whether the k largest are chosen by activation × norm of the decoder row.
        folded: what its reader has already folded.
        metadata: facts about its training, in this toolkit's words; see `sae.dictionary.origin`.
        settings: the settings in its files, as they are there.

    Shapes are those of the files: `dictionary_of` checks that they fit each other.
    """

    format: str
    activation: Activation
    W_enc: Tensor
    b_enc: Tensor | None
    W_dec: Tensor
    b_dec: Tensor
    centred: bool = True
    W_skip: Tensor | None = None
    input_norm: InputNorm = "none"
    k: int | None = None
    threshold: Tensor | None = None
    b_mag: Tensor | None = None
    r_mag: Tensor | None = None
    input_scale: float = 1.0
    output_scale: float | None = None
    pursuit: Mapping[str, Any] = field(default_factory=dict)
    ranked_by_norm: bool = False
    folded: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def dictionary_of(foreign: Foreign, place: str, dtype: torch.dtype | None = None) -> Dictionary:
    """The equal dictionary of this toolkit, for raw activations.

    Exactly folded are: a constant scale of the input; an input that is not centred (into the encoder's bias); norms of
    decoder rows other than 1 (into encoder, biases and thresholds), unless the k largest features are chosen without
    regard to them: then the rows stay as they are; and features that fire with both signs, each of which becomes two,
    j and d_sae + j. What depends on each input by itself is carried in the dictionary's frame: normalisation, a skip
    connection, and an output of another width. What was folded or carried is in `metadata["converted"]`.

    Args:
        foreign: the dictionary.
        place: beginning of error messages, such as `dictionary 'folder'`.
        dtype: number type; None: that of its decoder, at least float32.

    Raises:
        FormatError: its sizes contradict each other, or its numbers overflow.
    """
    given = foreign.W_dec.dtype
    work = torch.promote_types(torch.promote_types(given, torch.float32), dtype or torch.float32)
    d_in, d_sae = foreign.W_enc.shape
    folded = list(foreign.folded)
    foreign, signed = _one_sign(foreign), foreign.activation == "abs_topk"
    if signed:
        folded.append(f"features of both signs: feature j fires negatively as {d_sae:,} + j")
        d_sae *= 2
    try:
        dictionary = _empty(foreign, d_in, d_sae).to(work)
    except ValueError as error:
        raise FormatError(f"{place}: {error}") from error
    _set(dictionary, foreign, place)
    if foreign.activation == "matching_pursuit" and foreign.input_scale != 1:
        raise FormatError(f"{place}: matching pursuit of an input that is scaled cannot be used here")
    output_scale = foreign.input_scale if foreign.output_scale is None else foreign.output_scale
    if (foreign.input_scale, output_scale) != (1, 1):
        dictionary.W_enc.mul_(foreign.input_scale)
        dictionary.W_dec.div_(output_scale)
        dictionary.b_dec.div_(output_scale)
        folded.append(f"an input scale of {foreign.input_scale:.6g}")
        if output_scale != foreign.input_scale:
            folded.append(f"an output scale of {output_scale:.6g}")
    if not foreign.centred and dictionary.frame.d_out is None and bool(dictionary.b_dec.any()):
        encoder, offset = dictionary.W_enc.T.split(4096), dictionary.b_dec.double()
        dictionary.shift_pre_activations_(torch.cat([rows.double() @ offset for rows in encoder]).to(work))
        folded.append("an input that is not centred")
    folded += _unit_rows(dictionary, foreign)
    dictionary.to(dtype or work)
    for name, parameter in dictionary.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FormatError(f"{place}: its numbers are too large: {name} is not finite once they are folded into it")
    carried = [f"{key}={value}" for key, value in dictionary.frame.to_json().items()]
    converted = {
        "format": foreign.format, "folded": folded, "carried": carried, "settings": dict(foreign.settings),
    }  # fmt: skip
    dictionary.metadata = {**foreign.metadata, CONVERTED: converted}
    return dictionary.eval().requires_grad_(False)


@torch.no_grad()
def uncentred_bias(dictionary: Dictionary) -> Float[Tensor, " d_sae"]:
    """The encoder's bias of the same dictionary without subtraction of b_dec from the input."""
    if dictionary.frame.d_out is not None:
        return dictionary.b_enc.detach().clone()  # nothing is subtracted
    return (dictionary.b_enc.double() - dictionary.b_dec.double() @ dictionary.W_enc.double()).to(dictionary.dtype)


def check_frame(dictionary: Dictionary, title: str, *, norms: Sequence[InputNorm] = (), skip: bool = False) -> None:
    """Refuse to write what a format cannot hold.

    Args:
        dictionary: what is to be written.
        title: the format's name.
        norms: normalisations that it can hold.
        skip: whether it can hold a skip connection, and an output of another width than the input.

    Raises:
        FormatError: the message names it.
    """
    frame = dictionary.frame
    held = {"input_norm": frame.input_norm in norms, "skip": skip, "d_out": skip, "site_widths": False}
    missing = ", ".join(f"{key}={value}" for key, value in frame.to_json().items() if not held[key])
    if missing:
        raise FormatError(f"{title}'s format has no place for {missing}")


def row_norms(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, " d_sae"]:
    """Norms of the decoder's rows; 1 for a row of zeros."""
    norms = torch.cat([rows.double().norm(dim=-1) for rows in W_dec.split(4096)])
    return norms.where(norms > 0, 1.0)


def has_unit_rows(W_dec: Float[Tensor, "d_sae d_in"]) -> bool:
    """Whether all rows have norm 1 up to rounding."""
    return bool(((row_norms(W_dec) - 1).abs() <= _UNIT).all())


def processed_weights(dictionary: Dictionary) -> list[str]:
    """What a format loses that cannot say that the language model's weights were processed."""
    processing = dictionary.origin.models.get("", {}).get("weight_processing", "none")
    return [] if processing == "none" else [f"that it takes activations of a model with weight_processing={processing}"]


def other_format(dictionary: Dictionary) -> str | None:
    """The format of the other toolkit that a dictionary comes from; None if it comes from none."""
    converted = dictionary.metadata.get(CONVERTED)
    name = converted.get("format") if isinstance(converted, Mapping) else None
    return name if isinstance(name, str) else None


def _one_sign(foreign: Foreign) -> Foreign:
    """The same with twice the features, each of which fires positively: |h| is the larger of h and −h."""
    if foreign.activation != "abs_topk":
        return foreign
    both = {name: torch.cat([x, -x], dim) for name, dim in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0))
            for x in (getattr(foreign, name),)}  # fmt: skip
    return Foreign(**{**vars(foreign), "activation": "topk", **both})


def _empty(foreign: Foreign, d_in: int, d_sae: int) -> Dictionary:
    """A dictionary of the class and size, without weights.

    Raises:
        ValueError: k is missing or impossible.
    """
    d_out = foreign.W_dec.shape[-1]
    if foreign.centred and d_out != d_in:
        raise ValueError(f"it takes {d_in} numbers and gives {d_out}, so b_dec cannot be subtracted from the input")
    dictionary = _plain(foreign, d_in, d_sae)
    frame = Frame(foreign.input_norm, foreign.W_skip is not None, None if d_out == d_in else d_out)
    if frame != PLAIN:
        dictionary.set_frame(frame)
    return dictionary


def _plain(foreign: Foreign, d_in: int, d_sae: int) -> Dictionary:
    """The same with a plain frame."""
    if foreign.activation in ("relu", "jumprelu", "gated"):
        return {"relu": ReLU, "jumprelu": JumpReLU, "gated": Gated}[foreign.activation](d_in, d_sae)
    if foreign.activation == "matching_pursuit":
        return MatchingPursuit(d_in, d_sae, **foreign.pursuit)
    if type(foreign.k) is not int:
        raise ValueError(f"k={foreign.k!r}: expected a whole number")
    if foreign.activation == "topk":
        return TopK(d_in, d_sae, k=foreign.k)
    if has_unit_rows(foreign.W_dec):
        return BatchTopK(d_in, d_sae, k=foreign.k)
    return JumpReLU(d_in, d_sae)  # each feature has a threshold of its own once its decoder row has norm 1


def _set(dictionary: Dictionary, foreign: Foreign, place: str) -> None:
    """Copy all parameters.

    Raises:
        FormatError: one has another shape than the decoder's sizes imply.
    """
    values: dict[str, Tensor | None] = {"W_dec": foreign.W_dec, "b_dec": foreign.b_dec}
    if foreign.b_enc is not None:
        values[dictionary.bias_names[0]] = foreign.b_enc
    values |= {name: value for name in ("b_mag", "r_mag", "W_skip") if (value := getattr(foreign, name)) is not None}
    if foreign.threshold is not None:
        values["threshold"] = foreign.threshold.clamp(min=0)  # activations are never negative
    for name, value in {"W_enc": foreign.W_enc, **values}.items():
        assert value is not None
        parameter = dictionary.get_parameter(name)
        if value.shape != parameter.shape and not (name == "threshold" and value.ndim == 0):
            raise FormatError(
                f"{place}: its tensors do not fit each other: {name} would be {list(value.shape)} instead of "
                f"{list(parameter.shape)}"
            )
        parameter.copy_(value)


def _unit_rows(dictionary: Dictionary, foreign: Foreign) -> list[str]:
    """Fold the norms of the decoder's rows if that is exact; what was done."""
    if has_unit_rows(dictionary.W_dec):
        return []
    norms = row_norms(dictionary.W_dec)
    span = f"decoder rows of norm {float(norms.min()):.3g} to {float(norms.max()):.3g}"
    if isinstance(dictionary, TopK) and not foreign.ranked_by_norm:
        return [f"{span} are kept: the largest features are chosen without regard to them"]
    if isinstance(dictionary, MatchingPursuit):
        return [f"{span} are kept: each step subtracts its feature's row as it is"]
    dictionary.normalise_decoder_()
    return [span]
