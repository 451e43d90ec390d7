"""Metadata of a dictionary about the activations that it is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sae.activations.cache import ActivationCache
from sae.dictionary.base import Dictionary
from sae.dictionary.origin import Origin, Place
from sae.dictionary.sites import Sites
from sae.errors import CacheError, ConfigError


def place_of(cache: ActivationCache) -> Place:
    """The cache as a place where a dictionary is used."""
    return Place(f"cache {str(cache.path)!r}", cache.manifest.model, CacheError, cache.d_in)


def common_hook(dictionaries: Mapping[str, object], cache: ActivationCache) -> str:
    """The hook point that all dictionaries give by their metadata; if none states it, the cache's only one.

    Raises:
        ConfigError: they give different ones, or none states it and the cache has several.
    """
    own = {entry.origin.gives.hook for entry in dictionaries.values() if isinstance(entry, Dictionary)} - {None}
    hooks = own or set(cache.hooks)
    if len(hooks) > 1:
        names = ", ".join(sorted(map(repr, hooks)))
        if not own:
            raise ConfigError(f"nothing says which hook point it is: the cache has {names}; give hook=")
        raise ConfigError(
            f"the dictionaries are of the hook points {names}; give hook=, and only dictionaries of that one"
        )
    [hook] = hooks
    assert hook is not None
    return hook


def dictionary_metadata(
    cache: ActivationCache, hook: str | Sequence[str], target_hook: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """The origin that a dictionary records so that it can be reused: model, hook point, token policy and text.

    Args:
        cache: the cache it is trained on.
        hook: the hook point it reads; several for a crosscoder.
        target_hook: for a transcoder, the hook point whose activations it gives.

    Raises:
        CacheError: a hook point is not in the cache.
        ConfigError: the target comes before `hook`.
    """
    origin = joint_origin(cache, (hook,) if isinstance(hook, str) else hook)
    if target_hook is not None:
        origin = origin.giving(origin_of(cache, target_hook))
    return origin.to_json()


def joint_origin(cache: ActivationCache, hooks: Sequence[str]) -> Origin:
    """`origin_of` a hook point, or of a crosscoder of several."""
    origins = [origin_of(cache, hook) for hook in hooks]
    return origins[0] if len(origins) == 1 else Origin.joined(origins)


def origin_of(cache: ActivationCache, hook: str) -> Origin:
    """The origin of a dictionary that reads and gives the activations at `hook`."""
    manifest, sites = cache.manifest, Sites.one(hook, cache.d_in(hook))
    return Origin(
        sites, sites, {"": manifest.model}, manifest.tokens, manifest.context_length, manifest.data,
        manifest.identity(hook), activation_dtype=manifest.dtype,
    )  # fmt: skip
