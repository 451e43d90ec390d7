"""The features of any text: what fires at each token, and what is known about it from a feature store."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.dictionary.origin import check_belongs
from sae.dictionary.saved import weights_sha256
from sae.errors import ConfigError, ModelError, UnknownFeatureError
from sae.features.store import Features
from sae.model.language_model import LanguageModel
from sae.model.splicing import token_policy
from sae.numerics.modes import in_own_modes

_AT_ONCE = 1024
"""Tokens that are encoded at once."""
_MOST_TOKENS = 100_000
_NOTHING = tuple(torch.zeros(0, dtype=kind, device="cpu") for kind in (torch.int64, torch.int64, torch.float32))


class Firing(NamedTuple):
    """A feature and its activation."""

    feature: int
    activation: float


@dataclass(frozen=True)
class TextToken:
    """A token of a text, and what fires there.

    Attributes:
        token: its id.
        text: its text; a character made of several tokens is in the token that completes it.
        masked: whether tokens like it were masked out of training, such as BOS: no features are computed there.
        firing: the features that fire, strongest first.
    """

    token: int
    text: str
    masked: bool
    firing: tuple[Firing, ...]


@dataclass(frozen=True)
class KnownFeature:
    """What a feature store has on a feature.

    Attributes:
        density: share of the tokens scanned on which it fired.
        max: its largest activation there.
        mean: the mean of its non-zero activations.
        tokens: the tokens it fires on in its strongest examples.
    """

    density: float
    max: float
    mean: float
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class TextFeature:
    """A feature in a text.

    Attributes:
        feature: its number.
        max: its largest activation in the text; 0 if it does not fire.
        position: the token with that activation; None if it does not fire.
        count: tokens on which it fires.
        activations: its activation at each token; 0 on masked tokens.
        known: what the feature store has on it; None without one.
    """

    feature: int
    max: float
    position: int | None
    count: int
    activations: tuple[float, ...]
    known: KnownFeature | None


@dataclass(frozen=True)
class TextFeatures:
    """The features of a text.

    Attributes:
        hook: the hook point that the dictionary reads.
        d_sae: number of features of the dictionary.
        tokens: the text's tokens, in order, BOS included.
        features: the strongest features of the text by their largest activation, or the ones that were asked for.
        fired: number of features that fire at least once.
    """

    hook: str
    d_sae: int
    tokens: tuple[TextToken, ...]
    features: tuple[TextFeature, ...]
    fired: int


@in_own_modes
@torch.no_grad()
def text_features(
    dictionary: Dictionary, language_model: LanguageModel, text: str, *,
    top: int = 10, features: Sequence[int] = (), store: Features | str | Path | None = None,
    max_density: float = 1.0, hook: str | None = None,
) -> TextFeatures:  # fmt: skip
    """The features of a text at each of its tokens, and the strongest ones of the whole text.

    The text begins with BOS if contexts of the training did. A text that is longer than the model reads is cut into
    contexts, each of which begins like a text. Tokens that were masked out of training have no features.

    Args:
        dictionary: a dictionary of the model; a transcoder is read at its input.
        language_model: the model.
        text: the text.
        top: number of strongest features of the text.
        features: the features of the text instead, whether they fire or not.
        store: what is known about features: a feature store, or the path of one or of its run folder.
        max_density: leave out features that fire on a larger share of the tokens that the store was collected from:
            from the strongest ones, from those of tokens and from their number, not from `features`.
        hook: hook point that the dictionary reads; None for the one it was trained on.

    Raises:
        ConfigError: the text has no tokens or too many; `max_density` is given without a store; or the store is of
            another dictionary.
        UnknownFeatureError: the dictionary has no such feature.
        ModelError: the dictionary belongs to another model, or its hook point is unknown.
    """
    known = store if isinstance(store, Features) or store is None else Features(store)
    _check(dictionary, features, known, max_density)
    reads = dictionary.origin.at(hook).reads.hook
    if reads is None:
        raise ModelError("the dictionary does not record its hook point: give hook='blocks.N.…'")
    check_belongs(dictionary.origin.at(hook), language_model.as_place)
    start, contexts = _contexts(dictionary, language_model, text)
    encoded = [_encoded(dictionary, language_model, reads, context) for context in contexts]
    codes = _joined(encoded, dictionary.d_sae)
    listed = codes
    if known is not None and max_density < 1:
        listed = codes.without(known.summary().density > max_density)
    pieces = _pieces(language_model, contexts, start)
    chosen = list(dict.fromkeys(features)) or listed.strongest(top)
    return TextFeatures(
        reads,
        dictionary.d_sae,
        tuple(listed.at_tokens(pieces)),
        tuple(_feature(number, codes, known) for number in chosen),
        listed.fired,
    )


@dataclass(frozen=True)
class _Codes:
    """The tokens of a text and the features that fire on them, on the CPU.

    Attributes:
        tokens: ids.
        masked: tokens without features.
        row: the token of each firing.
        feature: its feature.
        value: its activation.
        d_sae: number of features of the dictionary.
    """

    tokens: Int[Tensor, " seq"]
    masked: Bool[Tensor, " seq"]
    row: Int[Tensor, " pairs"]
    feature: Int[Tensor, " pairs"]
    value: Float[Tensor, " pairs"]
    d_sae: int

    def without(self, features: Bool[Tensor, " d_sae"]) -> _Codes:
        """The same without some features."""
        kept = ~features[self.feature]
        return replace(self, row=self.row[kept], feature=self.feature[kept], value=self.value[kept])

    @property
    def fired(self) -> int:
        """Number of features that fire."""
        return len(self.feature.unique())

    def strongest(self, most: int) -> list[int]:
        """Features by their largest activation; equal ones by number."""
        largest = self.value.new_zeros(self.d_sae).scatter_reduce(0, self.feature, self.value, "amax")
        order = largest.sort(descending=True, stable=True).indices[:most]
        return order[largest[order] > 0].tolist()

    def at_tokens(self, pieces: Sequence[str]) -> Iterator[TextToken]:
        """Every token with its text and what fires there, strongest first; equal ones by number."""
        order = self.value.sort(descending=True, stable=True).indices
        order = order[self.row[order].sort(stable=True).indices]
        ends = torch.bincount(self.row, minlength=len(self.tokens)).cumsum(0).tolist()
        pairs = list(zip(self.feature[order].tolist(), self.value[order].tolist(), strict=True))
        start = 0
        for token, masked, piece, end in zip(self.tokens.tolist(), self.masked.tolist(), pieces, ends, strict=True):
            yield TextToken(token, piece, masked, tuple(Firing(*pair) for pair in pairs[start:end]))
            start = end

    def of(self, feature: int) -> list[float]:
        """A feature's activation at each token."""
        dense = self.value.new_zeros(len(self.tokens))
        mine = self.feature == feature
        dense[self.row[mine]] = self.value[mine]
        return dense.tolist()


def _feature(number: int, codes: _Codes, store: Features | None) -> TextFeature:
    activations = codes.of(number)
    most = max(activations)
    position = activations.index(most) if most > 0 else None
    known = None
    if store is not None:
        entry = store[number]
        known = KnownFeature(entry.density, entry.max, entry.mean, tuple(entry.peek))
    count = sum(activation > 0 for activation in activations)
    return TextFeature(number, most, position, count, tuple(activations), known)


def _contexts(dictionary: Dictionary, language_model: LanguageModel, text: str) -> tuple[int, list[list[int]]]:
    """The text's ids, in contexts that the model can read, and how many ids each begins with as in training."""
    policy = token_policy(dictionary)
    ids = language_model.text_ids(text)
    if not ids:
        raise ConfigError("the text has no tokens: give some words")
    if len(ids) > _MOST_TOKENS:
        raise ConfigError(
            f"the text has {len(ids):,} tokens: give at most {_MOST_TOKENS:,}, such as a part of the file"
        )
    bos = language_model.bos if policy is None or policy.prepend_bos else None
    start = [] if bos is None else [bos]
    length = max(1, language_model.info.max_context - len(start))
    return len(start), [[*start, *ids[first : first + length]] for first in range(0, len(ids), length)]


def _pieces(language_model: LanguageModel, contexts: Sequence[Sequence[int]], start: int) -> list[str]:
    """The text of each token; characters may span contexts."""
    texts = iter(language_model.to_texts([token for context in contexts for token in context[start:]]))
    return [
        piece
        for context in contexts
        for piece in (*language_model.to_texts(context[:start]), *(next(texts) for _ in context[start:]))
    ]


def _encoded(dictionary: Dictionary, language_model: LanguageModel, hook: str, context: list[int]) -> _Codes:
    """A context's tokens and features."""
    tokens = torch.tensor([context], device=language_model.device)
    policy = token_policy(dictionary)
    counted = torch.ones_like(tokens, dtype=torch.bool) if policy is None else policy.eligible(tokens)
    place = counted[0].nonzero()[:, 0].cpu()
    x = language_model.activations(tokens, hook)[hook][0].to(dictionary.device)
    firings = []
    for start in range(0, len(place), _AT_ONCE):
        part = place[start : start + _AT_ONCE]
        row, feature, value = (column.cpu() for column in dictionary.encode_pairs(x[part.to(x.device)]))
        fires = value > 0
        firings.append((part[row[fires]], feature[fires], value[fires].float()))
    row, feature, value = (torch.cat(column) for column in zip(*(firings or [_NOTHING]), strict=True))
    return _Codes(tokens[0].cpu(), ~counted[0].cpu(), row, feature, value, dictionary.d_sae)


def _joined(contexts: Sequence[_Codes], d_sae: int) -> _Codes:
    """The codes of contexts as those of one text."""
    starts = [0, *itertools.accumulate(len(context.tokens) for context in contexts)]
    return _Codes(
        torch.cat([context.tokens for context in contexts]),
        torch.cat([context.masked for context in contexts]),
        torch.cat([context.row + start for context, start in zip(contexts, starts, strict=False)]),
        torch.cat([context.feature for context in contexts]),
        torch.cat([context.value for context in contexts]),
        d_sae,
    )


def _check(dictionary: Dictionary, features: Collection[int], store: Features | None, max_density: float) -> None:
    for feature in features:
        if not 0 <= feature < dictionary.d_sae:
            raise UnknownFeatureError(f"feature {feature}: the dictionary has features 0 to {dictionary.d_sae - 1}")
    if store is None and max_density < 1:
        raise ConfigError(
            f"max_density={max_density}: how often features fire is known from a feature store only; collect one with "
            "'sae features RUN'"
        )
    if store is not None and len(store) != dictionary.d_sae:
        raise ConfigError(
            f"feature store {str(store.path)!r}: it has {len(store):,} features, the dictionary {dictionary.d_sae:,}; "
            "give the store of this dictionary"
        )
    if store is not None and store.info.get("dictionary_sha256") != weights_sha256(dictionary):
        raise ConfigError(
            f"feature store {str(store.path)!r}: it was collected from other weights than the dictionary's; give the "
            "store of this dictionary, or collect it anew with 'sae features RUN'"
        )
