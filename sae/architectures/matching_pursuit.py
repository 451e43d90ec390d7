"""Matching pursuit: features are chosen one after the other, each from what the others leave. For inference only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.kernels.interface import Selection
from sae.kernels.pattern import Pattern
from sae.numerics.modes import needs_plain_operators


class MatchingPursuit(Dictionary):
    """r = x − b_dec, then repeatedly: j = argmax_i r · W_dec,i,  a = ReLU(r · W_dec,j),  f_j += a,  r −= a W_dec,j.

    Encoder and decoder are the same matrix, and x̂ = f W_dec + b_dec. It comes from SAELens, which trains it; here it is
    encoded, evaluated and spliced like any other.

    Mallat and Zhang 1993, "Matching Pursuits With Time-Frequency Dictionaries"; Costa et al. 2025, "From Flat to
    Hierarchical: Extracting Sparse Representations with Matching Pursuit".

    Args:
        residual_threshold: a token is done when ‖r‖ falls below it; 0: never.
        max_iterations: most steps; None: d_in.
        stop_on_duplicate_support: whether a token is also done when a step adds no feature that has not fired.
    """

    architecture = "matching_pursuit"
    setting_names = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
    reads = ()
    bias_names = ()

    def __init__(
        self, d_in: int, d_sae: int, *, residual_threshold: float = 1e-2, max_iterations: int | None = None,
        stop_on_duplicate_support: bool = True, metadata: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(d_in, d_sae, metadata)
        if not isinstance(residual_threshold, int | float) or not 0 <= residual_threshold < float("inf"):
            raise ValueError(f"residual_threshold={residual_threshold!r}: expected a number from 0")
        if max_iterations is not None and (type(max_iterations) is not int or max_iterations < 1):
            raise ValueError(f"max_iterations={max_iterations!r}: expected a whole number from 1, or null")
        self.residual_threshold, self.max_iterations = residual_threshold, max_iterations
        self.stop_on_duplicate_support = bool(stop_on_duplicate_support)

    @property
    def b_enc(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`[d_sae]` of zeros: it has none."""
        return self.W_dec.new_zeros(self.d_sae)

    def select(self, x: Float[Tensor, "rows d_in"]) -> Selection:
        """The features that fire on each row, and their pre-activations before the first step."""
        pattern, _ = Pattern.of_nonzeros(self._pursue(x - self.b_dec))
        pre = (x - self.b_dec) @ self.W_dec.T
        return Selection(pattern, pre[pattern.rows, pattern.features])

    def lets_through(self, pre: Float[Tensor, "*batch d_sae"]) -> Bool[Tensor, "*batch d_sae"]:
        """Any feature may fire: the first step's pre-activations do not decide the next steps."""
        return torch.ones_like(pre, dtype=torch.bool)

    def _encode_rows(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Pattern, Float[Tensor, " pairs"]]:
        return Pattern.of_nonzeros(self._encode_densely(x).reshape(-1, self.d_sae))

    def _encode_densely(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        self._check_width(x)
        y = self.frame.normalised(x.to(self.W_dec.dtype)) - self.b_dec
        return self._pursue(y.reshape(-1, self.d_in)).reshape(*x.shape[:-1], self.d_sae)

    def _pursue(self, residual: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_sae"]:
        """Activations; differentiable, with the choice of features held fixed."""
        features = residual.new_zeros(len(residual), self.d_sae)
        going = torch.ones_like(residual[:, :1], dtype=torch.bool)
        waits = not needs_plain_operators(residual)
        for _ in range(self.max_iterations or self.d_in):
            chosen = (residual.detach() @ self.W_dec.detach().T).argmax(-1, keepdim=True)
            directions = self.W_dec[chosen[:, 0]]
            amounts = (residual * directions).sum(-1, keepdim=True).relu() * going
            is_new = (features.gather(-1, chosen) == 0) & (amounts > 0)
            features = features.scatter_add(-1, chosen, amounts)
            residual = residual - amounts * directions
            if self.stop_on_duplicate_support:
                going = going & is_new
            if self.residual_threshold > 0:
                going = going & ~(residual.detach().norm(dim=-1, keepdim=True) < self.residual_threshold)
            if waits and not bool(going.any()):
                break
        return features
