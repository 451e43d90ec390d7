"""What a dictionary does to each token by itself, around its sparse code: normalisation, its inverse, a linear map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import ShapeError
from sae.files.formats import HEAD

InputNorm = Literal["none", "centre", "layer_norm", "constant_norm"]
EQUAL_WIDTHS = 3
"""Version of the format since which a recorded d_out that equals d_in means that nothing is subtracted from y."""
SITE_WIDTHS = 4
"""Version of the format since which the widths of a crosscoder's sites are recorded."""
_EPSILON = 1e-5


@dataclass(frozen=True)
class Frame:
    """y = (x − shift) / scale,  f = act((y − b_dec) W_enc + b_enc),  x̂ = (f W_dec + b_dec) · scale + shift + x W_skip.

    With d_out, it is that of a transcoder, in which f = act(y W_enc + b_enc): b_dec belongs to the output alone.
    Dunefsky et al. 2024, "Transcoders Find Interpretable LLM Feature Circuits"; with W_skip, Paulo et al. 2025,
    "Transcoders Beat Sparse Autoencoders for Interpretability".

    Scale and shift are computed from each x by itself, so they cannot be folded into the weights. They come from other
    toolkits, and are for inference; this toolkit trains SAEs with a plain frame, transcoders with or without skip, and
    crosscoders, which differ from SAEs in the widths of their sites alone.

    Attributes:
        input_norm: what determines scale and shift. `none`: 1 and 0. `centre`: 1 and the mean of x's numbers, for a
            residual stream as transformer-lens's `center_writing_weights` makes it. `layer_norm`: their standard
            deviation and mean (SAELens, OpenAI); 10⁻⁵ is added to the divisor only, and the variance divides by
            d_in − 1. `constant_norm`: ‖x‖ / √d_in and 0 (SAELens's `constant_norm_rescale`).
        skip: whether there is a W_skip `[d_in, d_out]`.
        d_out: width of a transcoder's reconstruction; None: it is no transcoder, or one of before version 3 of the
            format, whose b_dec is subtracted from what it reads too. Their reconstruction has width d_in.
        site_widths: of a crosscoder: the width of each site in a row, which is read and reconstructed; empty: it is no
            crosscoder. Encoding and decoding do not depend on it; norms of decoder rows do.
    """

    input_norm: InputNorm = "none"
    skip: bool = False
    d_out: int | None = None
    site_widths: tuple[int, ...] = ()

    @staticmethod
    def from_json(config: Mapping[str, Any]) -> Frame:
        """The frame in the contents of `config.json`.

        Raises:
            ValueError: an entry has a value that none can have.
        """
        input_norm, skip, d_out = config.get("input_norm", "none"), config.get("skip", False), config.get("d_out")
        if input_norm not in get_args(InputNorm):
            raise ValueError(f"input_norm={input_norm!r} is not one of {', '.join(get_args(InputNorm))}")
        if not isinstance(skip, bool):
            raise ValueError(f"skip={skip!r}: expected true or false")
        if d_out is not None and (type(d_out) is not int or d_out < 1):
            raise ValueError(f"d_out={d_out!r}: expected a whole number from 1")
        _, version = HEAD
        if d_out == config.get("d_in") and config.get(version, EQUAL_WIDTHS) < EQUAL_WIDTHS:
            d_out = None
        return Frame(input_norm, skip, d_out, _site_widths(config))

    def to_json(self) -> dict[str, Any]:
        """Its entries in `config.json`; none for a plain frame."""
        facts = {**vars(self), "site_widths": list(self.site_widths)}
        return {name: value for name, value in facts.items() if getattr(self, name) != getattr(PLAIN, name)}

    def least_version(self, d_in: int) -> int:
        """The first version of the format that can hold the frame of a dictionary that reads d_in numbers."""
        if self == PLAIN:
            return 1
        if self.site_widths:
            return SITE_WIDTHS
        return EQUAL_WIDTHS if self.d_out == d_in else 2

    @property
    def needs_input(self) -> bool:
        """Whether a reconstruction depends on x in other ways than through the features."""
        return self.input_norm != "none" or self.skip

    def normalised(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """y."""
        if self.input_norm == "none":
            return x
        if self.input_norm == "constant_norm":
            norm = _constant_norm(x)
            return x / norm.where(norm > 0, 1.0)  # a row of zeros stays one
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred if self.input_norm == "centre" else centred / (x.std(dim=-1, keepdim=True) + _EPSILON)

    def scale(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
        """How much of a feature's decoder direction each unit of its activation adds to x̂."""
        if self.input_norm == "constant_norm":
            return _constant_norm(x)
        return x.std(dim=-1, keepdim=True) if self.input_norm == "layer_norm" else torch.ones_like(x[..., :1])

    def restored(
        self,
        decoded: Float[Tensor, "*batch d_out"],
        x: Float[Tensor, "*batch d_in"] | None,
        W_skip: Float[Tensor, "d_in d_out"] | None,
    ) -> Float[Tensor, "*batch d_out"]:
        """x̂ from f W_dec + b_dec, and the x that f was encoded from.

        Raises:
            ShapeError: x is needed and missing.
        """
        if not self.needs_input:
            return decoded
        if x is None:
            what = "adds a linear map of its input" if self.skip else "normalises each token by itself"
            raise ShapeError(
                f"this dictionary {what}, so features alone have no reconstruction: give the activations that they "
                "were encoded from too, as in decode(features, like=x)"
            )
        if self.input_norm in ("layer_norm", "constant_norm"):
            decoded = decoded * self.scale(x)
        if self.input_norm in ("layer_norm", "centre"):
            decoded = decoded + x.mean(dim=-1, keepdim=True)
        return decoded if W_skip is None else decoded + x @ W_skip


PLAIN = Frame()


def _site_widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    widths, d_in = config.get("site_widths", []), config.get("d_in")
    if not isinstance(widths, list) or not all(type(width) is int and width > 0 for width in widths):
        raise ValueError(f"site_widths={widths!r}: expected a list of whole numbers from 1")
    if widths and sum(widths) != d_in:
        raise ValueError(f"site_widths={widths!r}: they add up to {sum(widths)}, and d_in={d_in!r}")
    return tuple(widths)


def _constant_norm(x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"]:
    return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
