"""What a forward pass of a model reads: its tokens, and where in its text each of them stands."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

_NO_LENGTH = (ValueError, AttributeError, TypeError)  # of caches of recurrent models
BEYOND = 1 << 30
"""Where a token stands whose text began in a cache of unknown length."""


@dataclass(frozen=True)
class Pass:
    """A forward pass in progress.

    Attributes:
        tokens: what the model reads; None if it was given embeddings.
        positions: 0 for the first token of a text, be it in this pass or in the cache that the pass continues; −1 for
            padding.
    """

    tokens: Int[Tensor, "context seq"] | None
    positions: Int[Tensor, "context seq"]


class Passes:
    """The forward passes of a model while `watched` is open.

    Positions come from `position_ids` if the pass has them, else from the attention mask, else from the length of the
    key-value cache.

    Args:
        model: the Hugging Face model, whichever way it is called: with its head, or its base model alone.

    Attributes:
        now: the pass in progress; None between passes.
    """

    def __init__(self, model: nn.Module) -> None:
        base = getattr(model, "base_model", model)
        self._models: dict[nn.Module, list[str]] = {
            one: [name for name in inspect.signature(one.forward).parameters if name != "self"] for one in (model, base)
        }
        self._called: nn.Module | None = None
        self._lengths: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._end = 0
        self.now: Pass | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[Passes]:
        """While open, `now` is kept."""
        handles = [
            handle
            for model in self._models
            for handle in (
                model.register_forward_pre_hook(self._begin, with_kwargs=True),
                model.register_forward_hook(self._finish, always_call=True),
            )
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.now = self._called = None

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if self._called is not None and model is not self._called:
            return  # the base model inside the whole one
        self._called = model
        given = {**dict(zip(self._models[model], arguments, strict=False)), **named}
        tokens, embedded = given.get("input_ids"), given.get("inputs_embeds")
        source = tokens if tokens is not None else embedded
        self.now = None
        if not isinstance(source, Tensor) or source.ndim < 2:
            return
        before = self._cached(given)
        self._end = before + source.shape[1]
        self.now = Pass(tokens, positions(source.shape[0], source.shape[1], before, given, source.device))

    def _finish(self, model: nn.Module, _: Any, output: Any) -> None:
        if model is not self._called:
            return
        self.now = self._called = None
        cache = _cache(output.__dict__ if hasattr(output, "__dict__") else {})
        if cache is not None:
            with contextlib.suppress(TypeError):  # tuples of tensors know their length themselves
                self._lengths[cache] = self._end

    def _cached(self, given: Mapping[str, Any]) -> int:
        """Tokens that the pass's cache has seen."""
        cache, place = _cache(given), given.get("cache_position")
        if cache is None or isinstance(cache, tuple | list):
            return int(cache[0][0].shape[-2]) if cache else 0
        with contextlib.suppress(*_NO_LENGTH):
            return int(cache.get_seq_length())
        if isinstance(place, Tensor) and place.numel():
            return int(place.flatten()[0])
        with contextlib.suppress(*_NO_LENGTH):
            started = cache in self._lengths or cache.has_previous_state()
            return self._lengths.get(cache, BEYOND) if started else 0
        return BEYOND


def positions(
    contexts: int, length: int, before: int, given: Mapping[str, Any], device: torch.device
) -> Int[Tensor, "context seq"]:
    """Where in its text each token of a pass stands; −1 for padding.

    Args:
        contexts: of the pass.
        length: tokens of each in the pass.
        before: tokens in the cache.
        given: arguments of the pass; `position_ids` and `attention_mask` matter.
        device: of the result.
    """
    mask, ids = given.get("attention_mask"), given.get("position_ids")
    places = (before + torch.arange(length, device=device)).expand(contexts, length)
    real = torch.ones_like(places, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        attended = mask.to(device).bool()
        counted = attended.long().cumsum(-1) - 1
        start = min(before, mask.shape[1] - length)  # a mask may reach beyond the pass, to a static cache's end
        places = counted[:, start : start + length] + (before if mask.shape[1] == length else 0)
        real = attended[:, start : start + length]
    if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] == length:
        places = ids.to(device).long().expand(contexts, length)
    return torch.where(real, places, -1)


def _cache(given: Mapping[str, Any]) -> Any:
    caches = (given.get(name) for name in ("past_key_values", "cache_params"))
    return next((cache for cache in caches if cache is not None), None)
