"""Sparse codes in autograd: encode only what is selected, decode only what fires, gradients in factors.

A code has a `Pattern` (which features fire in which row) and values, one for each pair. The matrices are by feature:
`encoder = W_enc.T` and `decoder = W_dec`, both `[d_sae, d_in]`, or `[d_sae, d_out]` of a transcoder's decoder. The back
ends in `sae.kernels` do the computing.

Without a `GradientSink`, gradients of the matrices are dense tensors as from any PyTorch function. With one, they are
collected there in factors, for an optimiser that uses them a few features at a time and never stores the full gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.kernels import back_end, kernels_for, rounds_products
from sae.kernels.interface import FactoredGradient, Gradient, Kernels, Room, RowGradient, Selection, Subset
from sae.kernels.pattern import Pattern
from sae.numerics.modes import is_mapped, without_autocast


@dataclass
class GradientSink:
    """Collects the gradient of the encoder or of the decoder in factors, over a backward pass."""

    terms: list[FactoredGradient] = field(default_factory=list)
    blocks: list[RowGradient] = field(default_factory=list)

    def take(self, dense: Float[Tensor, "d_sae d_in"] | None = None) -> Gradient:
        """Return the collected gradient together with the one in `.grad`, and empty the sink."""
        gradient = Gradient(tuple(self.terms), tuple(self.blocks), dense)
        self.terms, self.blocks = [], []
        return gradient


def decode(
    pattern: Pattern,
    values: Float[Tensor, " pairs"],
    decoder: Float[Tensor, "d_sae d_out"],
    sink: GradientSink | None = None,
) -> Float[Tensor, "batch d_out"]:
    """Row i: Σ over its pairs of value · decoder[feature].

    Differentiable in `values` and `decoder`.
    """
    return cast(Tensor, _Decode.apply(values, decoder, pattern, sink))


def squared_error(
    pattern: Pattern,
    values: Float[Tensor, " pairs"],
    decoder: Float[Tensor, "d_sae d_out"],
    bias: Float[Tensor, " d_out"] | None,
    target: Float[Tensor, "batch d_out"],
    sink: GradientSink | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:
    """Mean over rows of ‖target − `decode` − bias‖², and the residual inside the norm, which has no gradient.

    Differentiable once in `values`, `decoder`, `bias` and `target`. Gradients are computed from the residual while its
    row and those of the decoder are at hand, and only scaled in the backward pass.
    """
    return cast("tuple[Tensor, Tensor]", _SquaredError.apply(values, decoder, bias, target, pattern, sink))


def encode_at(
    x: Float[Tensor, "batch d_in"],
    b_dec: Float[Tensor, " d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    selection: Selection,
    sink: GradientSink | None = None,
) -> Float[Tensor, " pairs"]:
    """(x − b_dec) · encoder[feature] + b_enc[feature] at every pair, as computed during selection.

    Differentiable in `x`, `b_dec`, `encoder` and `b_enc`. The gradient of b_dec is −(Σ of b_enc's gradient · encoder),
    which does not require the gradient of x.
    """
    return cast(Tensor, _EncodeAt.apply(x, b_dec, encoder, b_enc, selection.values, selection.pattern, sink))


def rows_of(
    matrix: Float[Tensor, "d_sae d_in"], features: Int[Tensor, " some"], sink: GradientSink | None = None
) -> Float[Tensor, "some d_in"]:
    """matrix[features], without duplicates; with a sink, their gradient is as small as they are."""
    return cast(Tensor, _RowsOf.apply(matrix, features, sink)) if sink is not None else matrix[features]


def entries_of(vector: Float[Tensor, " d_sae"], features: Int[Tensor, " pairs"] | slice) -> Float[Tensor, " entries"]:
    """vector[features], whose gradient is summed in the same order each time.

    On a CPU, indexing sums with atomic additions across threads; on a GPU, in order. For `index_select`, it is the
    other way round.
    """
    if isinstance(features, slice) or vector.device.type != "cpu":
        return vector[features]
    return vector.index_select(0, features)


def padded(
    pattern: Pattern, values: Float[Tensor, " pairs"]
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Values and features of every row, strongest first, padded with 0 to the longest row (at least 1 long).

    Waits for the device if rows differ in length.
    """
    if pattern.k is None:
        longest = max(int(pattern.offsets.diff().max()), 1) if pattern.batch else 1
        places = pattern.rows, torch.arange(pattern.pairs, device=values.device) - pattern.offsets[pattern.rows]
        features = pattern.features.new_zeros(pattern.batch, longest).index_put(places, pattern.features)
        values = values.new_zeros(pattern.batch, longest).index_put(places, values)
    else:
        values, features = values.view(-1, pattern.k), pattern.features.view(-1, pattern.k)
    order = values.detach().sort(dim=-1, descending=True, stable=True).indices
    return values.gather(-1, order), features.gather(-1, order)


@torch.no_grad()
def select_topk(
    x: Float[Tensor, "batch d_in"],
    b_dec: Float[Tensor, " d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    subset: Subset | None = None,
    low: Float[Tensor, "d_sae d_in"] | None = None,
) -> Selection:
    """The k largest pre-activations of each row, whatever their sign. Not differentiable; `encode_at` is.

    Args:
        subset: features for a second selection.
        low: the encoder in bfloat16, for the large product.
    """
    centred = x - b_dec
    selection = kernels_for(encoder).select_topk(*_operands(centred, encoder, low), b_enc, k, subset)
    return selection if low is None else _exact(selection, centred, encoder, b_enc, subset)


@torch.no_grad()
def select_batch_topk(
    x: Float[Tensor, "batch d_in"],
    b_dec: Float[Tensor, " d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    subset: Subset | None = None,
    low: Float[Tensor, "d_sae d_in"] | None = None,
) -> Selection:
    """The k · batch largest pre-activations of the whole batch, whatever their sign; arguments as in `select_topk`."""
    centred = x - b_dec
    selection = kernels_for(encoder).select_batch_topk(*_operands(centred, encoder, low), b_enc, k * len(x), subset)
    return selection if low is None else _exact(selection, centred, encoder, b_enc, subset)


@torch.no_grad()
def select_above(
    x: Float[Tensor, "batch d_in"],
    b_dec: Float[Tensor, " d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
    room: Room | None = None,
) -> Selection:
    """The pre-activations above their feature's threshold. Waits for the device, except in a `room` of fixed size."""
    kernels: Any = kernels_for(encoder)
    if room is None or room.capacity is None:
        selection = kernels.select_above(x - b_dec, encoder, b_enc, threshold)
        if room is not None:
            room.pairs = selection.pattern.pairs
        return selection
    selection = kernels.select_above(x - b_dec, encoder, b_enc, threshold, room.capacity)
    if room.enter is not None:
        room.enter(selection.total)
    return selection


def _operands(x: Tensor, encoder: Tensor, low: Tensor | None) -> tuple[Tensor, Tensor]:
    return (x, encoder) if low is None else (x.to(low.dtype), low)


def _exact(selection: Selection, x: Tensor, encoder: Tensor, b_enc: Tensor, subset: Subset | None) -> Selection:
    """Recompute, at the selected pairs, the values that a bfloat16 product rounded.

    A back end that keeps float32 sums returns selections that need no such change.
    """
    kernels = kernels_for(encoder)
    if not rounds_products(kernels):
        return selection
    pattern = selection.pattern
    values = kernels.sampled_product(pattern, x, encoder) + b_enc[pattern.features]
    if subset is None or selection.subset_places is None:
        return selection._replace(values=values)
    places = selection.subset_places
    among = kernels.sampled_product(Pattern.from_indices(places, len(subset.features)), x, encoder[subset.features])
    offsets = b_enc[subset.features] + subset.penalty
    return selection._replace(values=values, subset_values=among.view_as(places) + offsets[places])


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, decoder: Tensor, pattern: Pattern, sink: GradientSink | None
    ) -> Float[Tensor, "batch d_out"]:
        ctx.save_for_backward(values, decoder)
        ctx.pattern, ctx.sink = pattern, sink
        return kernels_for(decoder).decode(pattern, values, decoder)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, decoder = ctx.saved_tensors
        gradient = gradient.contiguous()
        kernels = _gradient_kernels(decoder, gradient)
        of_values = kernels.sampled_product(ctx.pattern, gradient, decoder) if ctx.needs_input_grad[0] else None
        term = FactoredGradient(ctx.pattern, values, gradient)
        of_decoder = _matrix_gradient(kernels, term, ctx.sink) if ctx.needs_input_grad[1] else None
        return of_values, of_decoder, None, None


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, decoder: Tensor, bias: Tensor | None, target: Tensor, pattern: Pattern,
        sink: GradientSink | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_out"]]:  # fmt: skip
        residual, products = kernels_for(decoder).residual(pattern, values, decoder, bias, target)
        ctx.save_for_backward(values, decoder, residual, products)
        ctx.pattern, ctx.sink = pattern, sink
        ctx.mark_non_differentiable(residual)
        return torch.linalg.vector_norm(residual, dim=-1).square().mean(), residual

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        values, decoder, residual, products = ctx.saved_tensors
        scale = gradient * (-2 / len(residual))
        of_decoder = None
        if ctx.needs_input_grad[1]:
            term = FactoredGradient(ctx.pattern, values * scale, residual)
            of_decoder = _matrix_gradient(kernels_for(decoder), term, ctx.sink)
        of_bias = residual.sum(0) * scale if ctx.needs_input_grad[2] else None
        of_target = residual * -scale if ctx.needs_input_grad[3] else None
        return products * scale, of_decoder, of_bias, of_target, None, None


class _EncodeAt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, b_dec: Tensor, encoder: Tensor, b_enc: Tensor, pre_activations: Tensor, pattern: Pattern,
        sink: GradientSink | None,
    ) -> Float[Tensor, " pairs"]:  # fmt: skip
        ctx.save_for_backward(x, b_dec, encoder)
        ctx.pattern, ctx.sink = pattern, sink
        return pre_activations.to(encoder.dtype, copy=True)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, b_dec, encoder = ctx.saved_tensors
        pattern, kernels = ctx.pattern, _gradient_kernels(encoder, gradient)
        gradient = gradient.contiguous()
        biases = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        of_b_enc = kernels.column_sums(pattern, gradient) if biases else None
        of_x = kernels.decode(pattern, gradient, encoder) if ctx.needs_input_grad[0] else None
        of_b_dec = -(of_b_enc @ encoder) if of_b_enc is not None and ctx.needs_input_grad[1] else None
        of_encoder = (
            _matrix_gradient(kernels, FactoredGradient(pattern, gradient, x - b_dec), ctx.sink)
            if ctx.needs_input_grad[2]
            else None
        )
        return of_x, of_b_dec, of_encoder, of_b_enc, None, None, None


class _RowsOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, features: Tensor, sink: GradientSink) -> Float[Tensor, "some d_in"]:
        ctx.features, ctx.sink = features, sink
        return matrix[features]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.sink.blocks.append(RowGradient(ctx.features, gradient))
        return None, None, None


def _gradient_kernels(weights: Tensor, gradient: Tensor) -> Kernels:
    """For a backward pass: the fastest; plain operators if it is itself recorded (`create_graph=True`) or mapped."""
    return back_end("reference") if torch.is_grad_enabled() or is_mapped(gradient) else kernels_for(weights)


def _matrix_gradient(kernels: Kernels, term: FactoredGradient, sink: GradientSink | None) -> Tensor | None:
    """The dense gradient; with a sink, the factors are collected there and there is none."""
    if sink is None:
        return kernels.feature_sums(term)
    sink.terms.append(term)
    return None
