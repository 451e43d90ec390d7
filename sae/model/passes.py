"""What a forward pass of a model reads: its tokens, and where in its text each of them stands."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sae.errors import ModelError

_NO_LENGTH = (ValueError, AttributeError, TypeError)  # of caches of recurrent models
BEYOND = 1 << 30
"""Where a token stands whose text began in a cache of unknown length."""
_CACHES = ("past_key_values", "cache_params", "state")
"""Arguments that carry what a model has read from one pass to the next: keys and values, recurrent states, RWKV's."""
_LIKE_A_CACHE = re.compile(r"(^|_)(past|mems?|memory|memories|states?|caches?)(_|$)")
_NO_CACHE = re.compile(r"hidden_states|cross_attention|encoder|^cache_position$|^(use|output|return)_")
"""Names that are like those of caches, and aren't."""


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


class _Read(NamedTuple):
    """What a cache holds: so many tokens of each context, padding included, and the position of each one's next."""

    tokens: int
    following: Int[Tensor, " context"] | None


class Passes:
    """The forward passes of a model while `watched` is open.

    Positions come from `position_ids` if the pass has them, else from an attention mask that reaches over all that was
    read, else from the passes that filled the cache, else from its length.

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
        self._caches: WeakIdKeyDictionary = WeakIdKeyDictionary()  # to what was read into each
        self._read = _Read(0, None)
        self.now: Pass | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[Passes]:
        """While open, `now` is kept.

        Raises:
            ModelError: in a pass that goes on from something else than the caches that are known here.
        """
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
        given = {**dict(zip(self._models[model], arguments, strict=False)), **named}
        _check_caches(given)
        self._called = model
        tokens, embedded = given.get("input_ids"), given.get("inputs_embeds")
        source = tokens if tokens is not None else embedded
        self.now = None
        if not isinstance(source, Tensor) or source.ndim < 2:
            return
        contexts, length = source.shape[:2]
        before = self._before(given, contexts)
        places = positions(contexts, length, before.tokens, given, source.device, before.following)
        self._read = _Read(before.tokens + length, _following(places, before))
        self.now = Pass(tokens, places)

    def _finish(self, model: nn.Module, _: Any, output: Any) -> None:
        if model is not self._called:
            return
        self.now = self._called = None
        cache = _cache(output.__dict__ if hasattr(output, "__dict__") else {})
        if cache is not None:
            with contextlib.suppress(TypeError):  # of what nothing can be kept
                self._caches[_lasting(cache)] = self._read

    def _before(self, given: Mapping[str, Any], contexts: int) -> _Read:
        """What the pass's cache holds."""
        cache = _cache(given)
        if cache is None:
            return _Read(0, None)
        tokens, known = _length(cache, given.get("cache_position")), None
        with contextlib.suppress(TypeError):
            known = self._caches.get(_lasting(cache))
        if known is None or (tokens is not None and tokens != known.tokens):
            return _Read(BEYOND if tokens is None else tokens, None)  # read, cut or emptied by others
        same = known.following is not None and len(known.following) == contexts
        return known if same else _Read(known.tokens, None)


def positions(
    contexts: int, length: int, before: int, given: Mapping[str, Any], device: torch.device,
    following: Int[Tensor, " context"] | None = None,
) -> Int[Tensor, "context seq"]:  # fmt: skip
    """Where in its text each token of a pass stands; −1 for padding.

    Args:
        contexts: of the pass.
        length: tokens of each in the pass.
        before: tokens in the cache, padding included.
        given: arguments of the pass; `position_ids` and `attention_mask` matter.
        device: of the result.
        following: where each context goes on after the cache; None: as if nothing in the cache were padding.
    """
    mask, ids = given.get("attention_mask"), given.get("position_ids")
    first = (torch.full((contexts,), before, device=device) if following is None else following).to(device)[:, None]
    places = first + torch.arange(length, device=device)
    real = torch.ones_like(places, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        attended = mask.to(device).bool()
        counted = attended.long().cumsum(-1) - 1
        start = min(before, mask.shape[1] - length)  # a mask may reach beyond the pass, to a static cache's end
        places = counted[:, start : start + length] + (first if mask.shape[1] == length else 0)
        real = attended[:, start : start + length]
    if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] == length:
        places = ids.to(device).long().expand(contexts, length)
    return torch.where(real, places, -1)


def _following(places: Int[Tensor, "context seq"], before: _Read) -> Int[Tensor, " context"] | None:
    """Where each context goes on: after its last token in the pass, or as before if all of it there is padding."""
    if places.shape[1] == 0:
        return before.following
    real, steps = places >= 0, torch.arange(places.shape[1], device=places.device)
    last = places.gather(1, torch.where(real, steps, 0).amax(1, keepdim=True))[:, 0]
    return torch.where(real.any(1), last + 1, before.tokens if before.following is None else before.following)


def _cache(given: Mapping[str, Any]) -> Any:
    caches = (given.get(name) for name in _CACHES)
    return next((cache for cache in caches if cache is not None), None)


def _lasting(cache: Any) -> Any:
    """What stays the same object from pass to pass: the cache, or of a list of states the first, written in place."""
    return cache[0] if isinstance(cache, tuple | list) and cache and isinstance(cache[0], Tensor) else cache


def _length(cache: Any, place: Any) -> int | None:
    """Tokens that a cache has seen, padding included, by its own account; None: it doesn't know."""
    if isinstance(cache, tuple | list):
        if not cache or not isinstance(cache[0], Tensor):
            return int(cache[0][0].shape[-2]) if cache else 0
        return None if bool(cache[0].any()) else 0  # states are zeros before anything is read
    with contextlib.suppress(*_NO_LENGTH):
        return int(cache.get_seq_length())
    if isinstance(place, Tensor) and place.numel():
        return int(place.flatten()[0])
    with contextlib.suppress(*_NO_LENGTH):
        return None if cache.has_previous_state() else 0
    return None


def _check_caches(given: Mapping[str, Any]) -> None:
    """Raise ModelError where a pass goes on from what isn't known here, so that its positions aren't either."""
    if isinstance(given.get("position_ids"), Tensor):
        return
    for name, value in given.items():
        no_cache = name in _CACHES or value is None or isinstance(value, bool | int | str)
        if not no_cache and _LIKE_A_CACHE.search(name) and not _NO_CACHE.search(name):
            raise ModelError(
                f"a pass goes on from {name}=…, and how many tokens that has read isn't known; give position_ids, or "
                "read the text in one pass"
            )
