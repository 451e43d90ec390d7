"""Checks that settings fit together: a dictionary's with its training's, and amounts of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sae.config.settings import DictionaryConfig, RunConfig, TrainConfig
from sae.errors import ConfigError


def check_fit(shape: DictionaryConfig, settings: TrainConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: k exceeds d_sae, the prefixes do not nest, or the learning rate would fall before it has risen.
    """
    if shape.k > shape.d_sae:
        raise ConfigError(f"dictionary.k={shape.k} exceeds dictionary.d_sae={shape.d_sae}: lower k or raise d_sae")
    if shape.is_nested:
        try:
            nested_sizes(shape.prefixes, shape.d_sae)
        except ValueError as error:
            raise ConfigError(f"dictionary.{error}") from error
    if settings.warmup_fraction + settings.decay_fraction > 1:
        raise ConfigError("train.warmup_fraction + train.decay_fraction exceed 1: lower one of them")


def check_skip(shape: DictionaryConfig, *, is_transcoder: bool) -> None:
    """Refuse a skip connection of a dictionary that reconstructs what it reads.

    Raises:
        ConfigError: it has one.
    """
    if shape.skip and not is_transcoder:
        raise ConfigError(
            "dictionary.skip=true: an autoencoder would learn to copy its input past the features; name another hook "
            "point to reconstruct with dictionary.gives (in Python, give target=), or take skip out"
        )


def check_memory(d_in: int, d_out: int, shape: DictionaryConfig, memory: int) -> None:
    """Refuse a dictionary that does not fit on a device during training.

    Args:
        d_in: width of the activations that it reads; 1 if not known yet.
        d_out: width of those that it reconstructs.
        shape: settings of the dictionary.
        memory: total memory of the device, in bytes.

    Raises:
        ConfigError: its matrices and Adam's two moments of each, in float32, need more memory.
    """
    needed = 3 * 4 * (shape.d_sae * (d_in + d_out) + shape.skip * d_in * d_out)
    if needed > memory:
        widths = f"d_in={d_in:,}{' or more' if d_in == 1 else ''}{f', d_out={d_out:,}' if d_out != d_in else ''}"
        raise ConfigError(
            f"dictionary.d_sae={shape.d_sae}: with {widths} its weights and Adam's "
            f"moments need {needed / 1e9:,.0f} GB, and the device has {memory / 1e9:,.0f} GB of memory: lower it"
        )


def check_snapshots(settings: TrainConfig, tokens: int) -> None:
    """Refuse snapshots that training would never reach.

    Args:
        settings: settings of the training.
        tokens: number of tokens it reads.

    Raises:
        ConfigError: a snapshot comes after the end of training.
    """
    late = [snapshot for snapshot in settings.snapshots if snapshot > tokens]
    if late:
        raise ConfigError(f"train.snapshots has {late[0]:,}, and training ends after {tokens:,} tokens: take it out")


def check_amounts(config: RunConfig) -> None:
    """Refuse numbers of tokens that would make a step after the harvest fail.

    Raises:
        ConfigError: no token of a context counts, no counted token has a next one, training has less than a batch,
            snapshots come after its end, or less than one context is to be evaluated or scanned.
    """
    data, settings = config.data, config.train
    masked = max(config.harvest.masked_positions, int(data.prepend_bos and config.harvest.mask_special_tokens))
    if data.tokens <= masked:
        raise ConfigError(
            f"data.tokens={data.tokens}: the first {masked} positions of every context are masked, so no token counts; "
            "raise it, or lower harvest.masked_positions"
        )
    for name, length in (("data.context_length", data.context_length), ("data.held_out_tokens", data.held_out_tokens)):
        if length < masked + 2:
            raise ConfigError(
                f"{name}={length}: the first {masked} positions of every context are masked, and a loss needs two more "
                f"(a token and the next one); raise it to {masked + 2} at least"
                + (", or lower harvest.masked_positions" if config.harvest.masked_positions == masked else "")
            )
    contexts, rest = divmod(data.tokens, data.context_length)
    tokens = settings.tokens or data.tokens - contexts * masked - min(rest, masked)
    if tokens < settings.batch_size:
        raise ConfigError(
            f"{_training_tokens(config, tokens)} are fewer than one batch of train.batch_size={settings.batch_size:,}: "
            "raise the former or lower the latter"
        )
    check_snapshots(settings, tokens)
    for key, amount, cached in _parts(config):
        least = min(data.context_length, cached)
        if amount < least:
            raise ConfigError(f"{key}={amount}: less than one context of {least} tokens; raise it")


def _training_tokens(config: RunConfig, tokens: int) -> str:
    if config.train.tokens:
        return f"train.tokens={tokens:,}"
    masked = config.data.tokens - tokens
    return f"data.tokens={config.data.tokens:,}{f', less {masked:,} that are masked,' if masked else ''}"


def amount_notes(config: RunConfig) -> list[str]:
    """Notes on amounts of tokens to show before anything runs, a line each."""
    notes, epochs = [], (config.train.tokens or 0) / config.data.tokens
    if epochs >= 2:
        notes.append(
            f"train.tokens={config.train.tokens:,} is {epochs:,.0f} epochs of data.tokens={config.data.tokens:,}; "
            "train.tokens=null is one epoch"
        )
    notes += [
        f"{key}={amount:,} is more than the {cached:,} cached tokens: all of them are read"
        for key, amount, cached in _parts(config)
        if amount > cached
    ]
    return notes


def _parts(config: RunConfig) -> list[tuple[str, int, int]]:
    """Settings that select part of a split by a number of tokens: key, value, and tokens in that split."""
    held_out, evaluation, harvest = config.data.held_out_tokens, config.evaluation, config.harvest
    training = min(config.data.tokens, harvest.stored_training_tokens) if harvest.live else config.data.tokens
    parts = [
        ("evaluation.tokens", evaluation.tokens, held_out),
        ("evaluation.downstream_tokens", evaluation.downstream_tokens, held_out),
        ("features.tokens", config.features.tokens, training),
    ]
    return [(key, amount, cached) for key, amount, cached in parts if isinstance(amount, int)]


def nested_sizes(prefixes: Sequence[float], d_sae: int) -> tuple[int, ...]:
    """Sizes of nested dictionaries, from ascending shares of d_sae.

    Raises:
        ValueError: they do not nest.
    """
    sizes = [round(share * d_sae) for share in prefixes]
    if not sizes or sizes[0] < 1 or sizes[-1] != d_sae or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(
            f"prefixes={list(prefixes)}: expected ascending shares of d_sae={d_sae} that end in 1 and each add at "
            f"least one feature, but these are {sizes} features"
        )
    return tuple(sizes)
