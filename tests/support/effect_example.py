"""Effects with chosen numbers and tokens, for what shows them."""

from __future__ import annotations

import dataclasses

from sae.effects.effects import Correlation, Effects, EffectSettings, FeatureEffect, TokenChange
from sae.results.estimate import Estimate


def make_effect(feature: int, token: str, size: float = 0.25) -> FeatureEffect:
    def estimate(value: float) -> Estimate:
        return Estimate(value, 0.012)

    return FeatureEffect(
        feature, density=0.02, positions=64, documents=31, activation=1.5, loss=estimate(size),
        loss_after=estimate(-0.125), kl=estimate(0.5 * size), kl_after=estimate(0.03), direct=estimate(0.0625),
        random_loss=estimate(0.001), random_kl=estimate(0.002), kl_above_random=estimate(0.4 * size),
        elsewhere_loss=estimate(0.02), elsewhere_kl=estimate(0.01), raised=(TokenChange(token, 0.7),),
        lowered=(TokenChange("b|`c", -0.3),),
    )  # fmt: skip


def make_effects(token: str = "word", sha: str = "a" * 64, hook: str = "blocks.1.hook_resid_pre") -> Effects:
    """Features 0 and 2, and 3 that never fires."""
    none = dataclasses.replace(
        make_effect(3, token), density=0.0, positions=0, documents=0, loss=Estimate(0.0, None), kl=Estimate(0.0, None),
        random_kl=Estimate(None, None), kl_above_random=Estimate(None, None), raised=(), lowered=(),
    )  # fmt: skip
    features = {0: make_effect(0, token), 2: make_effect(2, "x", 0.5), 3: none}
    features[2] = dataclasses.replace(features[2], direct=None, kl_above_random=Estimate(0.01, 0.012))
    return Effects(
        features, EffectSettings(), {"weights_sha256": sha, "d_sae": 4}, hook, {"name": "tiny"}, "b" * 64, {}, 5000,
        Correlation(0.5, -0.25, 0.125, 2), Correlation(0.75, -0.0625, 0.03125, 128), "c" * 64,
    )  # fmt: skip
