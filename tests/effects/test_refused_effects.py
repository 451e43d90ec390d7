"""What is refused when effects are measured, and scales at the edge of the numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from sae.activations import ActivationCache
from sae.architectures import TopK
from sae.config.sources import ModelConfig
from sae.effects import EffectSettings, measure_effects
from sae.errors import CacheError, ConfigError, UnknownFeatureError
from sae.model.language_model import LanguageModel
from tests.support.effect_case import MLP, RESID, make_dictionary, measure


def test_the_hook_point_is_that_of_the_dictionary(held_out: ActivationCache, language_model: LanguageModel) -> None:
    dictionary = make_dictionary(held_out, RESID)
    settings = EffectSettings(positions=2, null_positions=1, window=0)
    named, unnamed_hook = (
        measure_effects(dictionary, held_out, language_model, features=[1], settings=settings, **hook).to_json()
        for hook in ({"hook": RESID}, {})
    )
    assert named == unnamed_hook
    with pytest.raises(ConfigError, match="nothing says which hook point it is: the cache has"):
        measure_effects(unnamed(held_out), held_out, language_model, features=[1])


def test_refusals(held_out: ActivationCache, language_model: LanguageModel, tiny_model: Path) -> None:
    with pytest.raises(UnknownFeatureError, match="feature 48: the dictionary has features 0 to 47"):
        measure(held_out, language_model, features=[3, 48])
    with pytest.raises(ConfigError, match=f"hook '{MLP}': the dictionary was trained on '{RESID}'"):
        measure_effects(make_dictionary(held_out, RESID), held_out, language_model, hook=MLP)
    transcoder = make_dictionary(held_out, RESID)
    transcoder.metadata["target_hook"] = MLP
    with pytest.raises(ConfigError, match=f"hook '{RESID}': the dictionary gives activations of '{MLP}'; use it there"):
        measure_effects(transcoder, held_out, language_model, hook=RESID)
    with pytest.raises(CacheError, match=r"hook 'blocks.9.hook_mlp_out' is not in it"):
        measure_effects(unnamed(held_out), held_out, language_model, hook="blocks.9.hook_mlp_out")
    narrow = TopK(16, 48, k=4)
    with pytest.raises(ConfigError, match="activations have 32 numbers, the dictionary takes 16; give the hook point"):
        measure_effects(narrow, held_out, language_model, hook=RESID)
    folded = LanguageModel(ModelConfig(name=str(tiny_model), weight_processing="fold_ln"))
    with pytest.raises(CacheError, match="weight_processing"):
        measure(held_out, folded)
    wrong: dict[str, Any]
    for wrong, message in (
        ({"scale": math.nan}, "scale=nan: expected a finite number; 0 ablates a feature, 2 doubles it"),
        (
            {"scale": -1e300},
            "scale=-1e+300: expected at most 3.403e+38, float32's largest number; 0 ablates a feature, 2 doubles it",
        ),
        ({"positions": 0}, "positions=0: expected at least 1"),
        ({"null_positions": -1}, "null_positions=-1: expected at least 0"),
        ({"tokens": 0}, "tokens=0: expected at least 1"),
        ({"positions": 2**63}, f"positions={2**63}: expected at most 9,223,372,036,854,775,807"),
    ):
        with pytest.raises(ConfigError) as caught:
            EffectSettings(**wrong)
        assert str(caught.value) == message


def unnamed(cache: ActivationCache) -> Any:
    dictionary = make_dictionary(cache, RESID)
    dictionary.metadata = {}
    return dictionary


@pytest.mark.parametrize("scale", [1e19, 1e25, -3e38])
def test_a_scale_that_overflows_is_refused(held_out: ActivationCache, language_model, scale: float) -> None:
    """Squares in a norm exceed float32's 3.4e38 long before the activations do."""
    message = f"scale={scale:g}: the changed activations overflow in the model, which computes in float32; use a factor"
    with pytest.raises(ConfigError, match=re.escape(message)):
        measure(held_out, language_model, settings=EffectSettings(scale=scale, positions=6, window=2))


def test_a_large_scale_that_does_not_overflow_is_measured(held_out: ActivationCache, language_model) -> None:
    effects = measure(held_out, language_model, settings=EffectSettings(scale=1e12, positions=6, window=2))
    assert all(math.isfinite(effects[feature].kl.value or 0) for feature in effects.features)
