"""Schedules as functions of the step."""

from __future__ import annotations


def learning_rate(step: int, steps: int, peak: float, warmup_fraction: float, decay_fraction: float) -> float:
    """Linear rise over the first share of the steps, constant, linear fall to nearly nothing over the last share.

    `step` counts from 0; no step has rate 0.
    """
    rise = (step + 1) / (warmup_fraction * steps) if warmup_fraction > 0 else 1.0
    fall = (steps - step) / (decay_fraction * steps) if decay_fraction > 0 else 1.0
    return peak * min(1.0, rise, fall)


def l1_weight(step: int, steps: int, weight: float, warmup_fraction: float) -> float:
    """Linear rise from nothing over the first share of the steps, then constant."""
    return weight * (min(1.0, step / (warmup_fraction * steps)) if warmup_fraction > 0 else 1.0)


def default_learning_rate(d_sae: int) -> float:
    """2.4e-3 · √(4096 / d_sae): falls with the square root of the width, as in Gao et al. 2024, appendix A.3."""
    return 2.4e-3 * (4096 / d_sae) ** 0.5
