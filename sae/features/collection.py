"""Build a feature store from a dictionary and a cache, in one streaming pass over the activations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae.activations.cache import ActivationCache
from sae.activations.metadata import place_of
from sae.config.progress import StageProgress
from sae.config.settings import FeaturesConfig
from sae.config.splits import TRAIN
from sae.dictionary.base import Dictionary
from sae.dictionary.neighbours import nearest_neighbours
from sae.dictionary.origin import check_belongs
from sae.errors import ConfigError
from sae.features.collector import Collector
from sae.features.groups import ExampleGroups
from sae.features.logits import LogitEffects, logit_effects
from sae.features.scan import scan_contexts
from sae.features.store import Features
from sae.features.write import Collected, write_store
from sae.model.vocabulary import Vocabulary
from sae.numerics.modes import in_own_modes

if TYPE_CHECKING:
    from sae.model.language_model import LanguageModel


@in_own_modes
def collect(
    dictionary: Dictionary,
    cache: ActivationCache,
    folder: str | Path,
    settings: FeaturesConfig,
    *,
    hook: str,
    tokenizer: Any,
    language_model: LanguageModel | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch_contexts: int | None = None,
    split: str = TRAIN,
    progress: StageProgress | None = None,
) -> Features:
    """Scan a split of the cache once and write a feature store.

    Each token is encoded once; windows are cut while its codes are in memory. Counts and the firings kept stay on
    `device` until the end. Memory does not grow with the number of tokens. The result does not depend on
    `batch_contexts` (beyond the rounding of matrix products and, on a GPU, of the means).

    Args:
        dictionary: takes raw activations at `hook`; a transcoder's logits are those of its output.
        cache: its activations at `hook` are read.
        folder: where the store is written; an older store there is replaced.
        settings: what to keep.
        hook: the hook point whose activations are encoded.
        tokenizer: tokenizer of the model that the cache was harvested from; its vocabulary is saved in the store.
        language_model: for the logits each feature raises and lowers; None: the store has no logits.
        seed: seed of the random samples.
        device: where tokens are encoded.
        batch_contexts: number of contexts encoded at once; None: about 2²⁶ / d_sae tokens, at most 4,096; twice as many
            on a GPU.
        split: the split that is scanned; the histograms' scale is that of the training split.
        progress: called with the number of tokens done and the total.

    Raises:
        CacheError: the hook point is not in the cache, the cache is from another model than the dictionary's, or the
            store cannot be written.
        ConfigError: `settings.tokens` is less than one context, or the dictionary reads another hook point or width.
    """
    origin = dictionary.origin
    check_belongs(origin, place_of(cache), reads=hook)
    output_hook = origin.gives.hook or hook
    if dictionary.device != torch.empty(0, device=device).device:
        dictionary = copy.deepcopy(dictionary).to(device)
    collected = scan(dictionary, cache, settings, hook, seed, batch_contexts, split, progress)
    vocabulary = Vocabulary.of(tokenizer)
    return write_store(
        Path(folder),
        dictionary,
        cache,
        collected,
        settings,
        split=split,
        hook=hook,
        seed=seed,
        vocabulary=vocabulary,
        logits=_logits(dictionary, language_model, output_hook, settings, len(vocabulary)),
        neighbours=nearest_neighbours(dictionary.W_dec.detach(), settings.neighbours),
    )


def scan(
    dictionary: Dictionary,
    cache: ActivationCache,
    settings: FeaturesConfig,
    hook: str,
    seed: int = 0,
    batch_contexts: int | None = None,
    split: str = TRAIN,
    progress: StageProgress | None = None,
) -> Collected:
    """The streaming pass alone, in memory.

    Raises:
        ConfigError: `settings.tokens` is less than one context.
    """
    scale = cache.statistics(hook).mean_squared_norm ** 0.5 or 1.0
    groups = ExampleGroups.of(cache, settings, split)
    collector = Collector(
        dictionary.d_sae, settings, cache.context_length, scale, seed, groups, cache.rows(split), dictionary.device
    )
    for fired in scan_contexts(
        dictionary, cache, split, hook, tokens=settings.tokens, batch_contexts=batch_contexts, progress=progress
    ):
        collector.add(fired)
    if collector.rows == 0:
        raise ConfigError(
            f"features.tokens={settings.tokens}: less than one context of {cache.context_length} tokens; raise it"
        )
    return collector.finish()


def _logits(
    dictionary: Dictionary, language_model: LanguageModel | None, output: str, settings: FeaturesConfig, tokens: int
) -> LogitEffects | None:
    """Logit effects; None without a model, or if `output` is not in the space that the unembedding reads."""
    if language_model is None or not language_model.is_residual(output):
        return None
    return logit_effects(dictionary.W_dec.detach(), language_model.unembedding()[:, :tokens], settings.logits)
