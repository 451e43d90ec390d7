"""Effects of features on the model: one firing changed at a time in held-out text, with nulls and direct effects."""

from __future__ import annotations

from sae.effects.effects import Effects, EffectSettings, FeatureEffect
from sae.effects.measure import measure_effects
from sae.effects.store import effects_beside, read_effects

__all__ = ["EffectSettings", "Effects", "FeatureEffect", "effects_beside", "measure_effects", "read_effects"]
