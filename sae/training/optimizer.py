"""Adam for a dictionary: updates its two matrices a few features at a time, from factored gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.kernels import kernels_for
from sae.kernels.interface import AdamStep, Gradient, Moments, adam_numbers
from sae.kernels.sparse import GradientSink
from sae.training.decoder_rows import normalise_, tangent

_EPSILON = 1e-8


class FeatureAdam:
    """Adam (Kingma & Ba 2015) that computes, uses and drops the gradient of each block of features in turn.

    Gradients in the sinks (from the sparse core) and in `.grad` (from autograd) are added. If the architecture keeps
    decoder rows at norm 1, their gradient loses its part along the row, and they are renormalised after the step. In a
    crosscoder, the norms of the sites in a row add up to 1 instead (see `decoder_rows`), for which its decoder's
    gradient is made as one matrix.

    Args:
        dictionary: the dictionary to train; parameters that need no gradient are left alone.
        beta1: decay of the running mean of the gradient.
        beta2: decay of the running mean of its square.
        low_precision: keep a bfloat16 copy of the encoder for the large product; the weights keep their precision.
        max_norm: a gradient whose norm over all parameters is larger is scaled down to it (Pascanu et al. 2013), after
            decoder gradients have lost the part along their rows; None: gradients are not scaled.
        is_replayable: whether steps can be recorded and replayed, so that what differs between them is on the device.

    Attributes:
        encoder_sink: receives the gradient of W_enc.T from the sparse core.
        decoder_sink: receives the gradient of W_dec.
        encoder_bf16: the bfloat16 copy, or None.
        unit_rows: whether the kernels keep decoder rows at norm 1.
        site_widths: widths of a crosscoder's sites, if decoder rows are kept at sums of norms of 1; otherwise empty.
        lr: learning rate of the last step.
        norm: norm of the last gradient, before scaling; None without `max_norm`.
    """

    def __init__(
        self, dictionary: Dictionary, beta1: float, beta2: float, *, low_precision: bool = False,
        max_norm: float | None = None, is_replayable: bool = False,
    ) -> None:  # fmt: skip
        self.dictionary, self.beta1, self.beta2, self.max_norm = dictionary, beta1, beta2, max_norm
        self.norm: Float[Tensor, ""] | None = None
        self.encoder_sink, self.decoder_sink = GradientSink(), GradientSink()
        self.encoder, self.decoder = dictionary.W_enc.detach().T, dictionary.W_dec.detach()
        assert self.encoder.is_contiguous()
        self.moments = [
            Moments(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in (self.encoder, self.decoder)
        ]
        self.site_widths = dictionary.site_widths if dictionary.unit_decoder else ()
        self.unit_rows = dictionary.unit_decoder and not self.site_widths
        matrices = {id(dictionary.W_enc), id(dictionary.W_dec)}
        rest = {name: p for name, p in dictionary.named_parameters() if p.requires_grad and id(p) not in matrices}
        groups = [{"params": [p], "factor": dictionary.rate_factors.get(name, 1.0)} for name, p in rest.items()]
        no_group = [{"params": [], "factor": 1.0}]  # only matrices are trained
        self.is_replayable = is_replayable
        self.rest = torch.optim.Adam(
            groups or no_group, betas=(beta1, beta2), eps=_EPSILON, fused=True, capturable=is_replayable
        )
        self.steps, self.lr = 0, 0.0
        self.numbers: Float[Tensor, 3] | None = torch.zeros(3, device=self.encoder.device) if is_replayable else None
        self.encoder_bf16: BFloat16[Tensor, "d_sae d_in"] | None = None
        self.keep_bfloat16(low_precision)

    def keep_bfloat16(self, wanted: bool) -> None:
        """Keep a bfloat16 copy of the encoder from now on, or none."""
        self.encoder_bf16 = self.encoder.to(torch.bfloat16) if wanted else None

    def refresh(self) -> None:
        """Update the copy after the weights were changed from outside."""
        if self.encoder_bf16 is not None:
            self.encoder_bf16.copy_(self.encoder)

    def step(self, lr: float) -> None:
        """Take one step with all gradients collected since the last."""
        self.begin_step(lr)
        self.update()

    def begin_step(self, lr: float) -> None:
        """The part of `step` that is not the device's."""
        self.steps, self.lr = self.steps + 1, lr
        if self.numbers is not None:
            self.numbers.copy_(adam_numbers(self._adam_step()), non_blocking=True)

    @torch.no_grad()
    def update(self) -> None:
        """The rest of `step`."""
        dictionary, kernels = self.dictionary, kernels_for(self.encoder)
        encoder_grad, decoder_grad = dictionary.W_enc.grad, dictionary.W_dec.grad
        gradients = (
            self.encoder_sink.take(None if encoder_grad is None else encoder_grad.T),
            self.decoder_sink.take(decoder_grad),
        )
        if self.site_widths and dictionary.W_dec.requires_grad:
            gradients = gradients[0], tangent(kernels, self.decoder, gradients[1], self.site_widths)
        step = replace(self._adam_step(), scale=self._clip(*gradients), numbers=self.numbers)
        if dictionary.W_enc.requires_grad:
            kernels.adam_(self.encoder, self.moments[0], gradients[0], step, self.encoder_bf16)
        if dictionary.W_dec.requires_grad:
            decoder_step = replace(step, unit_rows=self.unit_rows)
            kernels.adam_(self.decoder, self.moments[1], gradients[1], decoder_step)
            if self.site_widths:
                normalise_(self.decoder, self.site_widths)
        dictionary.W_enc.grad = dictionary.W_dec.grad = None
        lr = self.lr if self.numbers is None else self.numbers[0]
        for group in self.rest.param_groups:
            group["lr"] = lr * group["factor"]
        self.rest.step()
        for name in dictionary.non_negative:
            dictionary.get_parameter(name).clamp_min_(0)
        self.rest.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Drop the gradients collected since the last step."""
        self.encoder_sink.take()
        self.decoder_sink.take()
        self.dictionary.zero_grad(set_to_none=True)

    def _adam_step(self) -> AdamStep:
        return AdamStep(self.lr, self.beta1, self.beta2, _EPSILON, self.steps)

    def _clip(self, encoder: Gradient, decoder: Gradient) -> Float[Tensor, ""] | None:
        """Scale the other gradients, and return the factor for those of the matrices. Waits for nothing."""
        if self.max_norm is None:
            return None
        kernels = kernels_for(self.encoder)
        rest = [p.grad for group in self.rest.param_groups for p in group["params"] if p.grad is not None]
        squares = [gradient.square().sum() for gradient in rest]
        if self.dictionary.W_enc.requires_grad:
            squares.append(kernels.gradient_squares(self.encoder, encoder, False).sum())
        if self.dictionary.W_dec.requires_grad:
            squares.append(kernels.gradient_squares(self.decoder, decoder, self.unit_rows).sum())
        self.norm = torch.stack(squares).sum().sqrt()
        scale = (self.max_norm / self.norm.clamp_min(torch.finfo(self.norm.dtype).tiny)).clamp_max(1)
        for gradient in rest:
            gradient.mul_(scale)
        return scale

    def bytes(self) -> int:
        """Memory of its state, which for small parameters is created in the first step."""
        matrices = [part for pair in self.moments for part in (pair.first, pair.second)]
        copies = [] if self.encoder_bf16 is None else [self.encoder_bf16]
        rest = [p for group in self.rest.param_groups for p in group["params"]]
        return sum(t.numel() * t.element_size() for t in (*matrices, *copies, *rest, *rest))

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs in addition to the weights."""
        moments = [{"first": moments.first, "second": moments.second} for moments in self.moments]
        rest = self.rest.state_dict()
        for group in rest["param_groups"]:
            group["lr"] = self.lr * group["factor"]  # not a tensor of a recorded step
        return {"steps": self.steps, "moments": moments, "rest": rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; the weights must have been loaded before."""
        self.steps = state["steps"]
        for moments, saved in zip(self.moments, state["moments"], strict=True):
            moments.first.copy_(saved["first"])
            moments.second.copy_(saved["second"])
        self.rest.load_state_dict(state["rest"])
        for group in self.rest.param_groups:
            group["capturable"] = self.is_replayable
        self.refresh()
