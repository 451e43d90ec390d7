"""Metadata of a dictionary about the activations that it is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae.activations.cache import ActivationCache
from sae.dictionary.base import Dictionary
from sae.dictionary.origin import Place
from sae.dictionary.sites import Hooks
from sae.errors import CacheError, ConfigError


def place_of(cache: ActivationCache) -> Place:
    """The cache as a place where a dictionary is used."""
    return Place(f"cache {str(cache.path)!r}", cache.manifest.model, CacheError, cache.d_in)


def common_hook(dictionaries: Mapping[str, object], cache: ActivationCache) -> str:
    """The hook point that all dictionaries give by their metadata; if none states it, the cache's only one.

    Raises:
        ConfigError: they give different ones, or none states it and the cache has several.
    """
    own = {Hooks.of(entry.metadata).gives for entry in dictionaries.values() if isinstance(entry, Dictionary)} - {None}
    hooks = own or set(cache.hooks)
    if len(hooks) > 1:
        names = ", ".join(sorted(map(repr, hooks)))
        start = (
            "the dictionaries are of the hook points" if own else "nothing says which hook point it is: the cache has"
        )
        raise ConfigError(f"{start} {names}; give hook=, and only dictionaries of that one")
    [hook] = hooks
    assert hook is not None
    return hook


def dictionary_metadata(cache: ActivationCache, hook: str, target_hook: str | None = None) -> dict[str, Any]:
    """The origin that a dictionary records so that it can be reused: model, hook point, token policy and text.

    Args:
        cache: the cache it is trained on.
        hook: the hook point it reads.
        target_hook: for a transcoder, the hook point whose activations it gives.

    Raises:
        CacheError: a hook point is not in the cache.
        ConfigError: the target comes before `hook`, or has another width.
    """
    manifest = cache.manifest
    target = {}
    if target_hook is not None:
        Hooks(hook, target_hook).check()
        if cache.d_in(target_hook) != cache.d_in(hook):
            raise ConfigError(
                f"target hook {target_hook!r}: its activations have width {cache.d_in(target_hook):,} and those of "
                f"{hook!r} have {cache.d_in(hook):,}; a transcoder's input and output have the same width"
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
