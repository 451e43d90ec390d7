"""The tokens that a forward pass reads, and the position of each in its text."""

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
"""Position of a token whose text began in a cache of unknown length."""
_CACHES = ("past_key_values", "cache_params", "state")
"""Arguments that carry state from one pass to the next: keys and values, recurrent states, RWKV's state."""
_LIKE_A_CACHE = re.compile(r"(^|_)(past|mems?|memory|memories|states?|caches?)(_|$)")
_NO_CACHE = re.compile(r"hidden_states|cross_attention|encoder|^cache_position$|^(use|output|return)_")
"""Names that look like those of caches but are not."""


@dataclass(frozen=True)
class Pass:
    """A forward pass in progress.

    Attributes:
        tokens: the token ids; None if the model was given embeddings.
        positions: 0 for the first token of a text, whether in this pass or in the cache that the pass continues; −1 for
            padding.
    """

    tokens: Int[Tensor, "context seq"] | None
    positions: Int[Tensor, "context seq"]


class _Read(NamedTuple):
    """A cache's contents: tokens per context, padding included, and the position of each context's next token."""

    tokens: int
    following: Int[Tensor, " context"] | None


class Passes:
    """The forward passes of a model while `watched` is open.

    Positions come from `position_ids` if the pass has them, else from an attention mask that covers everything read so
    far, else from the passes that filled the cache, else from the cache's length.

    Args:
        model: the Hugging Face model; it may be called with its head, or through its base model alone.

    Attributes:
        now: the pass in progress; None between passes.
    """

    def __init__(self, model: nn.Module) -> None:
        base = getattr(model, "base_model", model)
        self._models: dict[nn.Module, list[str]] = {
            module: [name for name in inspect.signature(module.forward).parameters if name != "self"]
            for module in (model, base)
        }
        self._called: nn.Module | None = None
        self._caches: WeakIdKeyDictionary = WeakIdKeyDictionary()  # cache → its contents
        self._read = _Read(0, None)
        self.now: Pass | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[Passes]:
        """While open, `now` is kept up to date.

        Raises:
            ModelError: a pass continues from an unknown kind of cache.
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
            return  # the base model inside the full model
        inputs = {**dict(zip(self._models[model], arguments, strict=False)), **named}
        _check_caches(inputs)
        self._called = model
        tokens, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        source = tokens if tokens is not None else embeddings
        self.now = None
        if not isinstance(source, Tensor) or source.ndim < 2:
            return
        contexts, length = source.shape[:2]
        before = self._before(inputs, contexts)
        places = positions(contexts, length, before.tokens, inputs, source.device, before.following)
        self._read = _Read(before.tokens + length, _following(places, before))
        self.now = Pass(tokens, places)

    def _finish(self, model: nn.Module, _: Any, output: Any) -> None:
        if model is not self._called:
            return
        self.now = self._called = None
        cache = _cache(output.__dict__ if hasattr(output, "__dict__") else {})
        if cache is not None:
            with contextlib.suppress(TypeError):  # no weak reference to it is possible
                self._caches[_lasting(cache)] = self._read

    def _before(self, inputs: Mapping[str, Any], contexts: int) -> _Read:
        """The contents of the pass's cache."""
        cache = _cache(inputs)
        if cache is None:
            return _Read(0, None)
        tokens, recorded = _length(cache, inputs.get("cache_position")), None
        with contextlib.suppress(TypeError):
            recorded = self._caches.get(_lasting(cache))
        if recorded is None or (tokens is not None and tokens != recorded.tokens):
            return _Read(BEYOND if tokens is None else tokens, None)  # filled, cut or emptied elsewhere
        same_contexts = recorded.following is not None and len(recorded.following) == contexts
        return recorded if same_contexts else _Read(recorded.tokens, None)


def positions(
    contexts: int, length: int, before: int, given: Mapping[str, Any], device: torch.device,
    following: Int[Tensor, " context"] | None = None,
) -> Int[Tensor, "context seq"]:  # fmt: skip
    """Position in its text of each token of a pass; −1 for padding.

    Args:
        contexts: number of contexts in the pass.
        length: tokens per context in the pass.
        before: tokens in the cache, padding included.
        given: arguments of the pass; `position_ids` and `attention_mask` are used.
        device: device of the result.
        following: position of each context's next token after the cache; None to assume a cache without padding.
    """
    mask, ids = given.get("attention_mask"), given.get("position_ids")
    first = (torch.full((contexts,), before, device=device) if following is None else following).to(device)[:, None]
    places = first + torch.arange(length, device=device)
    real = torch.ones_like(places, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
        attended = mask.to(device).bool()
        counted = attended.long().cumsum(-1) - 1
        start = min(before, mask.shape[1] - length)  # a mask may extend beyond the pass, to the end of a static cache
        places = counted[:, start : start + length] + (first if mask.shape[1] == length else 0)
        real = attended[:, start : start + length]
    if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] == length:
        places = ids.to(device).long().expand(contexts, length)
    return torch.where(real, places, -1)


def _following(places: Int[Tensor, "context seq"], before: _Read) -> Int[Tensor, " context"] | None:
    """Position of each context's next token: after its last one in the pass, or unchanged if all are padding."""
    if places.shape[1] == 0:
        return before.following
    real, steps = places >= 0, torch.arange(places.shape[1], device=places.device)
    last = places.gather(1, torch.where(real, steps, 0).amax(1, keepdim=True))[:, 0]
    return torch.where(real.any(1), last + 1, before.tokens if before.following is None else before.following)


def _cache(values: Mapping[str, Any]) -> Any:
    caches = (values.get(name) for name in _CACHES)
    return next((cache for cache in caches if cache is not None), None)


def _lasting(cache: Any) -> Any:
    """The object that persists between passes: the cache, or the first of a list of states, updated in place."""
    return cache[0] if isinstance(cache, tuple | list) and cache and isinstance(cache[0], Tensor) else cache


def _length(cache: Any, cache_position: Any) -> int | None:
    """Tokens that a cache says it has seen, padding included; None if it does not say."""
    if isinstance(cache, tuple | list):
        if not cache or not isinstance(cache[0], Tensor):
            return int(cache[0][0].shape[-2]) if cache else 0
        return None if bool(cache[0].any()) else 0  # states are zeros before anything is read
    with contextlib.suppress(*_NO_LENGTH):
        return int(cache.get_seq_length())
    if isinstance(cache_position, Tensor) and cache_position.numel():
        return int(cache_position.flatten()[0])
    with contextlib.suppress(*_NO_LENGTH):
        return None if cache.has_previous_state() else 0
    return None


def _check_caches(inputs: Mapping[str, Any]) -> None:
    """Raise ModelError if a pass continues from an unknown kind of cache, so its positions are unknown."""
    if isinstance(inputs.get("position_ids"), Tensor):
        return
    for name, value in inputs.items():
        no_cache = name in _CACHES or value is None or isinstance(value, bool | int | str)
        if not no_cache and _LIKE_A_CACHE.search(name) and not _NO_CACHE.search(name):
            raise ModelError(
                f"a pass continues from {name}=…, and the number of tokens read so far is unknown; give position_ids, "
                "or read the text in one pass"
            )
