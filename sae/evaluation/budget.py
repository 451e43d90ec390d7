"""How many tokens the language model reads in an evaluation: by default, at most a tenth of the harvest's time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch

from sae.activations.cache import ActivationCache, ContextBatch
from sae.config.settings import AUTO, EvaluationConfig
from sae.config.splits import HELD_OUT
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError

_SHARES = {
    "downstream_tokens": (768, 1024),
    "baseline_tokens": (1152, 512),
    "baseline_reconstruction_tokens": (256, 4096),
    "legacy_tokens": (1536, 512),
    "frozen_decoder_tokens": (96, 16_384),
}
"""One in n of the cache's tokens: n and the minimum, raised to a context if the language model reads whole ones."""
_WHOLE_CONTEXTS = ("downstream_tokens", "baseline_tokens", "legacy_tokens")
_MOST = {"baseline_tokens": 16_384, "legacy_tokens": 8192, "frozen_decoder_tokens": 200_000}
_PCA_EVERY, _PCA_LEAST, _PCA_OF_WIDTH, _PCA_MOST = 32, 16_384, 64, 200_000
"""Principal components: one in n of the cache's tokens; the minimum, also per dimension of d_in; the maximum."""


def settled(settings: EvaluationConfig, cache: ActivationCache) -> EvaluationConfig:
    """The settings with a number of tokens in place of each `auto`."""
    harvested = _harvested(cache)
    context = {name: min(cache.context_length, cache.rows(HELD_OUT)) for name in _WHOLE_CONTEXTS}
    numbers = {
        name: max(min(max(harvested // every, least), _MOST.get(name, math.inf)), context.get(name, 0))
        for name, (every, least) in _SHARES.items()
        if getattr(settings, name) == AUTO
    }
    return settings.model_copy(update=numbers)


def _harvested(cache: ActivationCache) -> int:
    """Number of tokens in the cache, whether or not their activations are stored."""
    return sum(cache.manifest.rows.values())


def pca_tokens(cache: ActivationCache, hook: str) -> int:
    """Number of training tokens that principal components are fitted on."""
    return fitted_tokens(cache, cache.d_in(hook))


def fitted_tokens(cache: ActivationCache, width: int) -> int:
    """Number of training tokens for a fit that depends on the covariance of activations of this width."""
    return min(max(_harvested(cache) // _PCA_EVERY, _PCA_LEAST, _PCA_OF_WIDTH * width), _PCA_MOST)


def settled_tokens(tokens: int | str | None) -> int | None:
    """The number in a setting that `settled` returned."""
    assert not isinstance(tokens, str), "the settings are not settled"
    return tokens


def announcement(
    settings: EvaluationConfig, cache: ActivationCache, dictionaries: Collection[Dictionary] | None = None
) -> str:
    """The cost of an evaluation, in tokens that pass through the language model once.

    Args:
        settings: of the evaluation.
        cache: its held-out tokens are evaluated.
        dictionaries: those that are evaluated together, counted as of one size; None: one autoencoder.
    """
    chosen, held_out = settled(settings, cache), cache.rows(HELD_OUT)
    tokens = min(held_out, chosen.tokens or held_out)
    own = min(tokens, settled_tokens(chosen.downstream_tokens) or tokens)
    baselines = min(own, settled_tokens(chosen.baseline_tokens) or own)
    legacy = min(held_out, settled_tokens(chosen.legacy_tokens) or 0)
    transcoders = sum(dictionary.origin.of_transcoder for dictionary in dictionaries or ())
    autoencoders = 1 if dictionaries is None else len(dictionaries) - transcoders
    kinds = 1 + sum(dictionary.W_skip is not None for dictionary in dictionaries or ())  # PCA, and each skip connection
    kinds += (1 + bool(chosen.frozen_decoder_tokens)) * bool(autoencoders) + bool(transcoders)  # random, frozen, linear
    passes = (3 + bool(transcoders) + autoencoders + transcoders) * own + kinds * baselines
    passes += (2 + 2 * autoencoders) * legacy if autoencoders else 0
    harvested = _harvested(cache)
    return (
        f"evaluation: {tokens:,} held-out tokens, {own:,} of them for losses: language-model passes over about "
        f"{passes:,} tokens (the harvest: {harvested:,})"
    )


def check_losses(positions: int, cache: ActivationCache, settings: EvaluationConfig) -> None:
    """Raise ConfigError if no position of the contexts for losses counts."""
    if positions == 0:
        raise ConfigError(
            f"evaluation.downstream_tokens={settings.downstream_tokens}: none of the chosen contexts has a token "
            "that counts and has a next one; "
            + (
                ""
                if settings.downstream_tokens is None
                else f"raise it to a context ({cache.context_length}) or more, or "
            )
            + "harvest more held-out text, longer contexts, or with fewer masked positions"
        )


def spread_contexts(cache: ActivationCache, settings: EvaluationConfig) -> Iterator[tuple[ContextBatch, bool]]:
    """Held-out contexts evenly spread over the split, for losses, and whether baselines are measured in them too.

    They are spread because neighbours mostly belong to one document, and standard errors are over documents. All
    contexts of a batch are of one kind.

    Args:
        cache: its held-out tokens are read, without activations.
        settings: `downstream_tokens` and `baseline_tokens` in numbers; None: all.
    """
    length, rows = cache.context_length, cache.rows(HELD_OUT)
    available = -(-rows // length) if settings.tokens is None or settings.tokens >= rows else settings.tokens // length
    chosen = _spread(range(available), settled_tokens(settings.downstream_tokens), length, round_up=False)
    with_baselines = set(_spread(chosen, settled_tokens(settings.baseline_tokens), length, round_up=True))
    places = set(chosen)
    pending: dict[bool, list[ContextBatch]] = {True: [], False: []}
    contexts = cache.contexts(HELD_OUT, batch_contexts=1, max_tokens=settings.tokens)
    for place, context in enumerate(contexts):
        if place not in places:
            continue
        group = pending[place in with_baselines]
        if group and group[0].tokens.shape != context.tokens.shape:  # the last context may be shorter
            yield joined(group), place in with_baselines
            group.clear()
        group.append(context)
        if len(group) == settings.batch_contexts:
            yield joined(group), place in with_baselines
            group.clear()
    for kind, group in pending.items():
        if group:
            yield joined(group), kind


def losses_read(settings: EvaluationConfig, cache: ActivationCache) -> int:
    """Number of tokens that `spread_contexts` yields."""
    rows, length = cache.rows(HELD_OUT), cache.context_length
    tokens = min(rows, settings.tokens or rows, settled_tokens(settings.downstream_tokens) or rows)
    return tokens if tokens == rows else tokens // length * length


def _spread(contexts: Sequence[int], tokens: int | None, length: int, *, round_up: bool) -> list[int]:
    """Equally spaced contexts that hold this number of tokens."""
    count = len(contexts)
    if tokens is not None:
        count = min(count, -(-tokens // length) if round_up else tokens // length)
    return [contexts[place * len(contexts) // count] for place in range(count)]


def joined(batches: Sequence[ContextBatch]) -> ContextBatch:
    """Contexts of one length as one batch, with activations if all have them; without sections."""
    parts = [(batch.tokens, batch.documents, batch.eligible) for batch in batches]
    tokens, documents, eligible = (torch.cat(columns) for columns in zip(*parts, strict=True))
    activations = [batch.activations for batch in batches if batch.activations is not None]
    return ContextBatch(
        batches[0].first_row, tokens, documents, eligible, torch.cat(activations) if activations else None
    )  # fmt: skip
