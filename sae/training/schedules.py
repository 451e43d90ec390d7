"""Schedules as functions of the step, and the controller of the sparsity weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

START_L0 = 4
"""Largest initial L0 of a ReLU in training, as a multiple of k."""
FALL = 0.007
"""Largest decrease of log(target L0) per step: from 4 k to k in two hundred steps."""


def learning_rate(step: int, steps: int, peak: float, warmup_fraction: float, decay_fraction: float) -> float:
    """Linear rise over the first share of the steps, then constant, then linear fall to nearly 0 over the last share.

    `step` counts from 0; no step has rate 0.
    """
    rise = (step + 1) / (warmup_fraction * steps) if warmup_fraction > 0 else 1.0
    fall = (steps - step) / (decay_fraction * steps) if decay_fraction > 0 else 1.0
    return peak * min(1.0, rise, fall)


def warmed_up(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear rise from 0 to 1 over the first share of the steps, then 1."""
    return min(1.0, step / (warmup_fraction * steps)) if warmup_fraction > 0 else 1.0


def falling_l0(step: int, steps: int, k: int, d_sae: int, fraction: float) -> float:
    """Target L0: falls exponentially from more than k to k over the first share of the steps.

    It starts at most at `START_L0` · k, at a quarter of all features, and at the value from which a step lowers its
    logarithm by `FALL`: L0 cannot follow any faster, and a weight that keeps growing in the meantime ends by silencing
    every feature.
    """
    start = min(START_L0, d_sae / (4 * k), math.exp(FALL * fraction * steps))
    return k * max(1.0, start) ** (1 - warmed_up(step, steps, fraction))


def default_learning_rate(d_sae: int, steps: int) -> float:
    """2.4e-3 · √(4096 / d_sae) · √(2000 / steps); the second root applies above 2000 steps.

    The first root follows Gao et al. 2024, appendix A.3. The second is there because features die in long trainings at
    a high rate (docs/log.md).
    """
    return 2.4e-3 * (4096 / d_sae) ** 0.5 * min(1.0, (2000 / steps) ** 0.5)


@dataclass(frozen=True)
class Gains:
    """How strongly λ responds when L0 differs from its target.

    Attributes:
        gain: gain of the proportional part.
        rate: gain of the integral part per step.
        horizon: number of steps that the running mean of L0 covers.
    """

    gain: float
    rate: float
    horizon: int


VERSION_1_GAINS = Gains(2.0, 0.03, 10)
"""Independent of the learning rate, so too strong at a high one (docs/log.md). Version-1 checkpoints keep them."""


def default_gains(learning_rate: float) -> Gains:
    """Gains in inverse proportion to the peak learning rate: 1.25 and 0.06 at 2.4e-3, at most 2 and 0.1.

    λ changes how fast L0 moves: in proportion to the weights' change per step, and about ten steps late because of
    Adam's momentum. A response that is too strong for this makes L0 oscillate around the target, by a factor of two and
    more.
    """
    gain = min(2.0, 3e-3 / learning_rate)
    return Gains(gain, gain / 20, 2)


class SteeredWeight:
    """λ = exp(w + gain · e), with e = log(L0 / target) of a running mean of L0, and w growing by `rate` · e each step.

    A proportional-integral controller on the logarithm: λ grows while too many features fire, falls while too few do,
    and is constant only when L0 equals the target. Everything stays on the device.

    Args:
        target: target L0, in features per token; a tensor if recorded steps read it from the device.
        start: initial λ, unless `begin` sets a better one.
        gains: how strongly λ responds.
    """

    def __init__(
        self, target: float | int | Float[Tensor, ""], start: float, device: torch.device, gains: Gains
    ) -> None:
        self.target, self.gains = target, gains
        self.integral: Float[Tensor, ""] = torch.full((), start, device=device).log()
        self.l0: Float[Tensor, ""] = torch.full((), float("nan"), device=device)

    @property
    def value(self) -> Float[Tensor, ""]:
        """λ at this step."""
        return (self.integral + self.gains.gain * self._error().nan_to_num()).exp()

    def observe(self, l0: Float[Tensor, ""]) -> None:
        """Update λ with a batch's L0."""
        self.l0.copy_(torch.where(self.l0.isnan(), l0, self.l0.lerp(l0.to(self.l0), 1 / self.gains.horizon)))
        self.integral.add_(self.gains.rate * self._error())

    def begin(self, b_enc: Float[Tensor, " d_sae"], gain: float | Float[Tensor, ""] = 1.0) -> None:
        """Start with the λ that the biases correspond to, if their mean is negative: λ/2 = −gain · b.

        The minimum over f of (gain · z − f)² + λ f is at ReLU(gain · z − λ/2), so any other λ would push the bias of a
        feature of norm 1 away from its value.

        Args:
            b_enc: the biases.
            gain: how much of its pre-activation z a feature finds in its target; 1 for an SAE.
        """
        weight = -2 * gain * b_enc.detach().mean()
        self.integral.copy_(torch.where(weight > 0, weight.log(), self.integral))

    def state_dict(self) -> dict[str, Any]:
        return {"integral": self.integral.clone(), "l0": self.l0.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.integral.copy_(state["integral"])
        self.l0.copy_(state["l0"])

    def _error(self) -> Float[Tensor, ""]:
        """log(L0 / target), clamped to ±1; −1 if nothing fires."""
        return (self.l0 / self.target).clamp_min(1e-9).log().clamp(-1, 1)
