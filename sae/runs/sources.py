"""The sources that a run's dictionaries are trained from: loaders of a cache, or passes of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sae.activations.cache import ActivationCache
from sae.activations.live import LivePass, LiveSource
from sae.activations.loader import ActivationLoader
from sae.activations.same_model import check_same_model
from sae.config.progress import StageProgress
from sae.config.settings import RunConfig
from sae.model.language_model import LanguageModel

Sources = dict[str, ActivationLoader] | dict[str, LiveSource]


def training_sources(
    config: RunConfig, cache: ActivationCache, hooks: Sequence[str], language_model: Callable[[], LanguageModel],
    device: torch.device, progress: StageProgress,
) -> Sources:  # fmt: skip
    """Batches of each hook point, in the order in which a run's dictionary is trained on them.

    Args:
        config: its `seed`, `harvest` and `train` sections are used.
        cache: the run's cache.
        hooks: hook points, all read from one pass of the model if the cache is for live training.
        language_model: returns the model; called only for live training.
        device: where to train.
        progress: called in live training with (tokens in the pool that is being filled, tokens it will have).

    Raises:
        CacheError: a hook point is not in the cache, no token is eligible, or the model is not the cache's.
        ConfigError: train.pool_tokens is less than a context, in live training.
    """
    settings = config.train
    seed = config.seed if settings.shuffle_seed is None else settings.shuffle_seed
    if not cache.is_live:
        return {
            hook: ActivationLoader(
                cache, hook, batch_size=settings.batch_size, seed=seed, pool_tokens=settings.pool_tokens, device=device
            )
            for hook in hooks
        }
    model = language_model()
    check_same_model(cache, model, hooks[0])
    live = LivePass(
        cache, model, hooks, batch_size=settings.batch_size, seed=seed, pool_tokens=settings.pool_tokens,
        batch_contexts=config.harvest.batch_contexts, device=device, progress=progress,
    )  # fmt: skip
    return live.sources
