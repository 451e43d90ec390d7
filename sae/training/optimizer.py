"""Adam for a dictionary: its two matrices a few features at a time, from gradients in factors; the rest as usual."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import BFloat16
from torch import Tensor

from sae.architectures import JumpReLU
from sae.dictionary import Dictionary
from sae.kernels import kernels_for
from sae.kernels.interface import AdamStep, Moments
from sae.sparse import GradientSink

RATE_FACTORS = {"threshold": 10.0}
"""By how much the learning rate of a parameter differs: JumpReLU's thresholds are as large as activations, that is many
times an encoder weight, and with the rate of weights they would not get to where they should be (docs/log.md)."""

_EPSILON = 1e-8


class FeatureAdam:
    """Adam (Kingma & Ba 2015) that makes, uses and drops the gradient of each block of features in turn.

    What the sparse core leaves in the sinks and what autograd leaves in `.grad` both count. Where the architecture has
    decoder rows of norm 1, their gradient loses its part along the row, and they are renormalised after the step.

    Args:
        dictionary: what is trained; parameters that need no gradient are left alone.
        beta1: decay of the running mean of the gradient.
        beta2: decay of the running mean of its square.
        low_precision: keep a bfloat16 copy of the encoder, for the large product; the weights stay as they are.

    Attributes:
        encoder_sink: where the sparse core puts the gradient of W_enc.T.
        decoder_sink: where it puts that of W_dec.
        low: the copy, or None.
        lr: of the last step.
    """

    def __init__(self, dictionary: Dictionary, beta1: float, beta2: float, *, low_precision: bool = False) -> None:
        self.dictionary, self.beta1, self.beta2 = dictionary, beta1, beta2
        self.encoder_sink, self.decoder_sink = GradientSink(), GradientSink()
        self.encoder, self.decoder = dictionary.W_enc.detach().T, dictionary.W_dec.detach()
        assert self.encoder.is_contiguous()
        self.moments = [
            Moments(torch.zeros_like(weight), torch.zeros_like(weight)) for weight in (self.encoder, self.decoder)
        ]
        matrices = {id(dictionary.W_enc), id(dictionary.W_dec)}
        rest = {name: p for name, p in dictionary.named_parameters() if p.requires_grad and id(p) not in matrices}
        groups = [{"params": [p], "factor": RATE_FACTORS.get(name, 1.0)} for name, p in rest.items()]
        self.rest = torch.optim.Adam(groups, betas=(beta1, beta2), eps=_EPSILON, fused=True)
        self.steps, self.lr = 0, 0.0
        self.low: BFloat16[Tensor, "d_sae d_in"] | None = None
        if low_precision:
            self.low = self.encoder.to(torch.bfloat16)

    def refresh(self) -> None:
        """Make the copy anew, after the weights were changed from outside."""
        if self.low is not None:
            self.low.copy_(self.encoder)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Take one step with everything that was collected since the last."""
        self.steps, self.lr = self.steps + 1, lr
        dictionary, kernels = self.dictionary, kernels_for(self.encoder.device)
        of_encoder, of_decoder = dictionary.W_enc.grad, dictionary.W_dec.grad
        settings = {"lr": lr, "beta1": self.beta1, "beta2": self.beta2, "eps": _EPSILON, "number": self.steps}
        kernels.adam_(
            self.encoder,
            self.moments[0],
            self.encoder_sink.take(None if of_encoder is None else of_encoder.T),
            AdamStep(**settings),
            self.low,
        )
        kernels.adam_(
            self.decoder,
            self.moments[1],
            self.decoder_sink.take(of_decoder),
            AdamStep(**settings, unit_rows=dictionary.unit_decoder),
        )
        dictionary.W_enc.grad = dictionary.W_dec.grad = None
        for group in self.rest.param_groups:
            group["lr"] = lr * group["factor"]
        self.rest.step()
        if isinstance(dictionary, JumpReLU):
            dictionary.threshold.clamp_min_(0)
        self.rest.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the weights."""
        moments = [{"first": moments.first, "second": moments.second} for moments in self.moments]
        return {"steps": self.steps, "moments": moments, "rest": self.rest.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the weights must have been loaded before."""
        self.steps = state["steps"]
        for moments, saved in zip(self.moments, state["moments"], strict=True):
            moments.first.copy_(saved["first"])
            moments.second.copy_(saved["second"])
        self.rest.load_state_dict(state["rest"])
        self.refresh()
