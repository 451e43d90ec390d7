"""What a dictionary is told of the activations that it is trained on."""

from __future__ import annotations

from typing import Any

from sae.activations.cache import ActivationCache
from sae.dictionary.origin import Place
from sae.dictionary.sites import Hooks
from sae.errors import CacheError, ConfigError


def place_of(cache: ActivationCache) -> Place:
    """The cache as a place where a dictionary is used."""
    return Place(f"cache {str(cache.path)!r}", cache.manifest.model, CacheError, cache.d_in)


def dictionary_metadata(cache: ActivationCache, hook: str, target_hook: str | None = None) -> dict[str, Any]:
    """What a dictionary must know of its origin to be reused: model, hook point, token policy, text.

    Args:
        cache: what it is trained on.
        hook: the hook point that it reads.
        target_hook: of a transcoder, the one whose activations it gives.

    Raises:
        CacheError: a hook point is not in the cache.
        ConfigError: the target comes before what is read, or has another width.
    """
    manifest = cache.manifest
    target = {}
    if target_hook is not None:
        Hooks(hook, target_hook).check()
        if cache.d_in(target_hook) != cache.d_in(hook):
            raise ConfigError(
                f"target hook {target_hook!r}: its activations have {cache.d_in(target_hook):,} numbers and those of "
                f"{hook!r} {cache.d_in(hook):,}; transcoders give as many numbers as they read"
            )
        target = {"target_hook": target_hook, "target_activations": manifest.identity(target_hook)}
    return {
        **target,
        "model": manifest.model,
        "hook": hook,
        "tokens": manifest.tokens,
        "context_length": manifest.context_length,
        "data": manifest.data,
        "activations": manifest.identity(hook),
        "activation_dtype": manifest.dtype,
    }
