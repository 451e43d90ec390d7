"""Effects of features on the model: changes of single firings measured, and functions of the logits attributed."""

from __future__ import annotations

from sae.effects.attribution import AttributedDictionary, Attribution, Contribution, FeatureTotal
from sae.effects.effects import Effects, EffectSettings, FeatureEffect
from sae.effects.integrate import attribute
from sae.effects.measure import measure_effects
from sae.effects.next_token import NextToken
from sae.effects.store import effects_beside, read_effects

__all__ = [
    "AttributedDictionary",
    "Attribution",
    "Contribution",
    "EffectSettings",
    "Effects",
    "FeatureEffect",
    "FeatureTotal",
    "NextToken",
    "attribute",
    "effects_beside",
    "measure_effects",
    "read_effects",
]
