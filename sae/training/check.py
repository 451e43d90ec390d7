"""Checks that dictionaries can be trained in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from sae.config.check import check_fit, check_memory, check_skip, check_snapshots
from sae.config.environment import memory_of
from sae.errors import ConfigError, TrainingError
from sae.training.joined import JoinedSource, single_sources, site_widths_of
from sae.training.recipe import Recipe, build, check_start, freeze_
from sae.training.source import BatchSource, OrderedSource, metadata_of
from sae.training.traits import check_read


def common_pass(
    sources: Mapping[str, BatchSource], recipes: Mapping[str, Recipe], device: torch.device
) -> tuple[int, int]:
    """Return the batch size and the number of tokens that all dictionaries share.

    Raises:
        ConfigError: a source is missing; settings differ that must be equal in one pass; a dictionary does not fit into
            the device's memory.
        TrainingError: fewer tokens than a batch.
    """
    for name, recipe in recipes.items():
        for part in recipe.sources.values():
            if part not in sources:
                raise ConfigError(f"{name}: there is no source {part!r}; the sources are {', '.join(sources)}")
            if not hasattr(sources[part], "load_state_dict"):
                raise ConfigError(
                    f"{part}: a {type(sources[part]).__name__} is not a source of batches: give an ActivationLoader, "
                    "or sae.IterableSource(batches) with a list of tensors [batch, d_in]"
                )
        if recipe.target is not None:
            _check_transcoder(name, sources[recipe.source], sources[recipe.target])
    used = {name: sources[name] for recipe in recipes.values() for name in recipe.sources.values()}
    _check_sources(single_sources(used))
    folders = [recipe.folder for recipe in recipes.values() if recipe.folder is not None]
    if len(set(folders)) < len(folders):
        raise ConfigError("two recipes have the same folder: give each its own")
    sizes = {source.batch_size for source in used.values()}
    if len(sizes) > 1:
        raise ConfigError(f"the sources have batches of {sorted(sizes)} rows: make them equal")
    for name, other_name in itertools.pairwise(recipes):
        for key in ("tokens", "log_every", "checkpoint_every"):
            value, other_value = getattr(recipes[name].settings, key), getattr(recipes[other_name].settings, key)
            if value != other_value:
                raise ConfigError(
                    f"train.{key} is {value} for {name} and {other_value} for {other_name}: one pass has a single "
                    "value; train them separately"
                )
    settings = next(iter(recipes.values())).settings
    source = next(iter(used.values()))
    tokens = settings.tokens or source.tokens_per_epoch
    if tokens is None:
        raise ConfigError("train.tokens: the source has no end, so say how many tokens to train on")
    if tokens < source.batch_size:
        raise TrainingError(
            f"{tokens:,} training tokens are fewer than one batch of {source.batch_size:,}: "
            f"{'raise train.tokens' if settings.tokens else 'harvest more (data.tokens)'}, or lower train.batch_size"
        )
    _check_recipes(recipes, sources, tokens // source.batch_size * source.batch_size, memory_of(device))
    return source.batch_size, tokens


def _check_transcoder(name: str, source: BatchSource, target: BatchSource) -> None:
    """Check that a target can be computed from an input, as far as their origins are known.

    Raises:
        ConfigError: one has several sites, their texts differ, or the model computes the target before the input.
    """
    for part in (source, target):
        if isinstance(part, JoinedSource):
            raise ConfigError(
                f"{name}: a source has {len(part.parts)} sites, but a transcoder reads one and gives one: leave target "
                "out to train a crosscoder, which gives what it reads"
            )
    if isinstance(source, OrderedSource) and isinstance(target, OrderedSource):
        (text, cache), (target_text, target_cache) = source.token_text, target.token_text
        if text != target_text:
            raise ConfigError(
                f"{name}: the target's cache, {target_cache!r}, has other text than the input's, {cache!r}: harvest "
                "both hook points with the same data settings, preferably in one cache"
            )
    try:
        metadata_of(source, target)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _check_sources(sources: Mapping[str, BatchSource]) -> None:
    """Check that batches read together can belong to the same tokens, as far as this is known beforehand.

    Raises:
        ConfigError: two sources are the same object, or loaders have different orders.
    """
    for (name, source), (other_name, other) in itertools.combinations(sources.items(), 2):
        if source is other:
            raise ConfigError(
                f"{name} and {other_name} are the same source, and each would get every second batch: "
                + ("leave target out" if other_name == "target" else "name it once, for all recipes that read it")
            )
        if (
            isinstance(source, OrderedSource)
            and isinstance(other, OrderedSource)
            and source.token_order != other.token_order
        ):
            raise ConfigError(
                f"{name} and {other_name} give tokens in different orders: load them with the same split, seed, "
                "pool_tokens and block_tokens, from caches of the same text"
            )


def _check_recipes(recipes: Mapping[str, Recipe], sources: Mapping[str, BatchSource], tokens: int, memory: int) -> None:
    for name, recipe in recipes.items():
        try:
            d_out = None if recipe.target is None else sources[recipe.target].d_in
            source = sources[recipe.source]
            check_recipe(recipe, source.d_in, d_out, memory, site_widths_of(source))
            check_snapshots(recipe.settings, tokens)
            _check_folder(recipe)
        except ConfigError as error:
            raise (ConfigError(f"{name}: {error}") if len(recipes) > 1 else error) from None


def check_recipe(
    recipe: Recipe, d_in: int, d_out: int | None, memory: int, site_widths: tuple[int, ...] = ()
) -> None:  # fmt: skip
    """Check that a dictionary can be trained as its recipe says, without allocating its weights.

    Args:
        recipe: the dictionary's recipe.
        d_in: width of its input.
        d_out: width of its target; None: it is trained to reconstruct its input.
        memory: the device's memory in bytes.
        site_widths: widths of the sites of a crosscoder.

    Raises:
        ConfigError: settings contradict each other or have no effect; there is too little memory; frozen names or the
            start do not fit.
    """
    config, settings = recipe.dictionary, recipe.settings
    check_skip(config, is_transcoder=d_out is not None)
    check_memory(d_in, d_out or d_in, config, memory)
    check_fit(config, settings)
    check_read(config, settings)
    with torch.device("meta"):
        dictionary = build(config, d_in, d_out, site_widths)
    freeze_(dictionary, settings.freeze)
    check_start(recipe, dictionary)


def _check_folder(recipe: Recipe) -> None:
    if recipe.settings.snapshots and recipe.folder is None:
        raise ConfigError("train.snapshots needs a folder to save them in: give one, or take it out")
