"""Measure the effects of features from dictionary, cache and model: a group at a time, each saved when it is done."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from sae.activations.cache import ActivationCache
from sae.activations.metadata import common_hook, place_of
from sae.activations.same_model import check_same_model
from sae.config.progress import Progress, silent, within
from sae.dictionary.base import Dictionary
from sae.dictionary.origin import check_belongs
from sae.dictionary.saved import identify
from sae.effects.direct import DirectPath
from sae.effects.effects import Effects, EffectSettings, FeatureEffect
from sae.effects.firings import Firings, scan_firings
from sae.effects.interventions import FIRING, Changes, plan_changes
from sae.effects.known import Known
from sae.effects.meter import ChangeMeter
from sae.effects.store import effects_key
from sae.effects.summarise import summarise, token_changes
from sae.errors import ConfigError, SaeError, UnknownFeatureError
from sae.files.paths import expanded
from sae.files.writing import locked
from sae.model.language_model import LanguageModel
from sae.model.tail import Tail
from sae.model.vocabulary import Vocabulary
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import numpy_generator

_FEATURES_AT_ONCE = 64


@in_own_modes
def measure_effects(
    dictionary: Dictionary,
    cache: ActivationCache,
    language_model: LanguageModel,
    *,
    hook: str | None = None,
    features: Sequence[int] | None = None,
    sample: int | None = None,
    settings: EffectSettings | None = None,
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    batch_contexts: int = 16,
    copies: int = 64,
    progress: Progress | None = None,
) -> Effects:
    """Change features one firing at a time on held-out text and measure how the model's predictions change.

    Each place gets its own copy of its context, in which f becomes α·f there and nothing else changes (see
    `ChangeMeter` for the definition). Effects on the next token and on the tokens after it are measured, along with
    two nulls and the first-order effect along the direct path (`DirectPath`).

    The result for a feature does not depend on other features, on `batch_contexts` or on `copies` (beyond the rounding
    of matrix products).

    Args:
        dictionary: takes raw activations; it is not modified, and copied if it is not on `device`.
        cache: its held-out text is read.
        language_model: the model that the cache was harvested from.
        hook: hook point at which a feature's output is changed: the one whose activations the dictionary gives. A
            transcoder's features fire at the one that it reads, which the cache must have too. None: the one the
            dictionary was trained on, or the cache's only one.
        features: features to measure; None: those that fire in the text.
        sample: if `features` is None, the number of features drawn at random from those that fire; None: all.
        settings: how to measure; None: the defaults, ablation.
        folder: the run folder: effects are written to it, and features measured before with the same weights, data and
            settings are not measured again. None: nothing is written.
        device: where tokens are encoded.
        batch_contexts: number of contexts held at once.
        copies: maximum number of context copies in one pass.
        progress: called with (stage, done, total).

    Returns:
        Effects of the requested features. Correlations are over all measured features, including those in `folder`.

    Raises:
        CacheError: the hook point is not in the cache, or the cache is from another model than the dictionary
            or the language model.
        ConfigError: the dictionary has another width or hook point, or there is too little text.
        ModelError: the hook point cannot be replaced.
        UnknownFeatureError: the dictionary has no such feature.
    """
    settings, report = settings or EffectSettings(), progress or silent
    hook = hook or common_hook({"dictionary": dictionary}, cache)
    tail = _checked(dictionary, cache, language_model, hook, features)
    if dictionary.W_dec.device != torch.empty(0, device=device).device:
        dictionary = copy.deepcopy(dictionary).to(device)
    path = None if folder is None else expanded(folder)
    with contextlib.nullcontext() if path is None else locked(path, "measurement of effects"):
        results = Known(_blank(dictionary, cache, language_model, hook, settings), path)
        if features is not None and not set(features) - results.features.keys() and results.features:
            return (results.effects() if results.is_written() else results.write()).only(features)
        reads = dictionary.origin.read_elsewhere
        firings = scan_firings(
            dictionary, cache, reads or hook, positions=settings.positions, seed=settings.seed, tokens=settings.tokens,
            features=features, progress=within(report, "firings"),
        )  # fmt: skip
        chosen = sorted(set(features)) if features is not None else draw_features(firings, sample, settings.seed)
        meter = ChangeMeter(
            tail, DirectPath.of(language_model, hook), dictionary, cache,
            mean=firings.mean, scale=settings.scale, window=settings.window, seed=settings.seed, reads=reads,
            batch_contexts=batch_contexts, copies=copies,
        )  # fmt: skip
        missing = [feature for feature in chosen if feature not in results.features]
        vocabulary = Vocabulary.of(language_model.tokenizer)
        try:
            for group, changes in _measured(meter, missing, firings, settings, vocabulary, report):
                results.add_(group, changes, firings.tokens)
        except (KeyboardInterrupt, SaeError):
            results.save()
            raise
        return results.write().only(chosen)


def draw_features(firings: Firings, sample: int | None, seed: int) -> list[int]:
    """Features that fire at a measurable place: all of them, or `sample` drawn at random.

    Raises:
        ConfigError: there are none.
    """
    alive = np.unique(firings.places.feature)
    if not len(alive):
        raise ConfigError(
            f"effects: none of the {len(firings.count):,} features fires in the {firings.tokens:,} held-out tokens "
            "read; read more of them, or name features"
        )
    if sample is not None and sample < len(alive):
        alive = numpy_generator("effects: features", seed).choice(alive, sample, replace=False)
    return sorted(alive.tolist())


def _measured(
    meter: ChangeMeter, features: list[int], firings: Firings, settings: EffectSettings, vocabulary: Vocabulary,
    report: Progress,
) -> Iterator[tuple[dict[int, FeatureEffect], Changes]]:  # fmt: skip
    """Yield the effects of one group of features after another, with the changes they are computed from."""
    plan = plan_changes(features, firings, null_positions=settings.null_positions, seed=settings.seed)
    density, done = firings.density, 0
    W_U = meter.direct.W_U if meter.direct is not None else None

    report("effects", 0, len(plan))

    def count(changed: int) -> None:
        nonlocal done
        done += changed
        report("effects", done, len(plan))

    for start in range(0, len(features), _FEATURES_AT_ONCE):
        group = features[start : start + _FEATURES_AT_ONCE]
        measured = meter.measure(plan.at(np.isin(plan.feature, group)), count)
        changes = measured.changes
        effects = {}
        for feature in group:
            own = changes.at(changes.feature == feature)
            places = int((own.kind == FIRING).sum())
            tokens = token_changes(measured.token_sums.get(feature), places, W_U, vocabulary, settings.top)
            effects[feature] = summarise(feature, float(density[feature]), own, tokens)
        yield effects, changes


def _checked(
    dictionary: Dictionary, cache: ActivationCache, language_model: LanguageModel, hook: str,
    features: Sequence[int] | None,
) -> Tail:  # fmt: skip
    """The model from the hook point on, after checking that the arguments fit together."""
    check_belongs(dictionary.origin, place_of(cache), gives=hook)
    for feature in features or ():
        if not 0 <= feature < dictionary.d_sae:
            raise UnknownFeatureError(f"feature {feature}: the dictionary has features 0 to {dictionary.d_sae - 1}")
    check_same_model(cache, language_model, hook)
    return language_model.tail(hook)


def _blank(
    dictionary: Dictionary, cache: ActivationCache, language_model: LanguageModel, hook: str, settings: EffectSettings
) -> Effects:
    """Effects without features, with settings, identities and key filled in."""
    identity, activations, model = identify(dictionary), cache.manifest.identity(hook), language_model.info.to_json()
    key = effects_key(identity, activations, hook, model, settings)
    policy = cache.policy.to_json()
    road = str(language_model.tail(hook).road)
    return Effects({}, settings, identity, hook, model, activations, policy, 0, None, None, key, road)
