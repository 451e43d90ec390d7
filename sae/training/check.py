"""What dictionaries that are trained in one pass must have in common."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from sae.config.check import check_fit, check_memory
from sae.config.environment import memory_of
from sae.dictionary.sites import Hooks
from sae.errors import ConfigError, TrainingError
from sae.training.recipe import Recipe, build, check_start, freeze_
from sae.training.source import BatchSource, OrderedSource, origin
from sae.training.traits import check_read


def common_pass(
    sources: Mapping[str, BatchSource], recipes: Mapping[str, Recipe], device: torch.device
) -> tuple[int, int]:
    """Batch size and number of tokens, which all share.

    Raises:
        ConfigError: a source that is not there; settings that a common pass cannot have; a dictionary that the device's
            memory cannot hold.
        TrainingError: fewer tokens than a batch.
    """
    for name, recipe in recipes.items():
        for part in (recipe.source, recipe.target):
            if part is not None and part not in sources:
                raise ConfigError(f"{name}: there is no source {part!r}; there is {', '.join(sources)}")
            if part is not None and not hasattr(sources[part], "load_state_dict"):
                raise ConfigError(
                    f"{part}: a {type(sources[part]).__name__} is no source of batches: give an ActivationLoader, or "
                    "sae.IterableSource(batches) of a list of tensors [batch, d_in]"
                )
        if recipe.target is not None:
            _check_transcoder(name, sources[recipe.source], sources[recipe.target])
    used = {name: sources[name] for made in recipes.values() for name in (made.source, made.target) if name is not None}
    _check_sources(used)
    folders = [recipe.folder for recipe in recipes.values() if recipe.folder is not None]
    if len(set(folders)) < len(folders):
        raise ConfigError("two recipes have the same folder: give each one of its own")
    sizes = {source.batch_size for source in used.values()}
    if len(sizes) > 1:
        raise ConfigError(f"the sources have batches of {sorted(sizes)} rows: make them of one size")
    for one, other in itertools.pairwise(recipes):
        for key in ("tokens", "log_every", "checkpoint_every"):
            ours, theirs = getattr(recipes[one].settings, key), getattr(recipes[other].settings, key)
            if ours != theirs:
                raise ConfigError(
                    f"train.{key} is {ours} for {one} and {theirs} for {other}: one pass has one; train them apart"
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
    """Whether a target can be computed from an input, as far as it is known where they come from.

    Raises:
        ConfigError: they have different widths or are of different texts, or the model computes the target before the
            input.
    """
    if target.d_in != source.d_in:
        raise ConfigError(
            f"{name}: the target has {target.d_in} numbers a row, the input {source.d_in}: they must have as many"
        )
    if isinstance(source, OrderedSource) and isinstance(target, OrderedSource):
        (text, place), (other_text, other_place) = source.text, target.text
        if text != other_text:
            raise ConfigError(
                f"{name}: the target's cache, {other_place!r}, is of other text than the input's, {place!r}: harvest "
                "both hook points with the same data settings, best in one cache"
            )
    metadata = origin(source, target)
    if metadata.get("target_model") is None:
        try:
            Hooks.of(metadata)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


def _check_sources(sources: Mapping[str, BatchSource]) -> None:
    """Whether batches that are read together can be of the same tokens, as far as that is known beforehand.

    Raises:
        ConfigError: two are one object, or loaders have different orders.
    """
    for (one, ours), (other, theirs) in itertools.combinations(sources.items(), 2):
        if ours is theirs:
            raise ConfigError(
                f"{one} and {other} are one source, and each would get every second batch: "
                + ("leave target out" if other == "target" else "name it once, for all that read it")
            )
        if isinstance(ours, OrderedSource) and isinstance(theirs, OrderedSource) and ours.order != theirs.order:
            raise ConfigError(
                f"{one} and {other} give tokens in different orders: load them with the same split, seed, pool_tokens "
                "and block_tokens, from caches of the same text"
            )


def _check_recipes(recipes: Mapping[str, Recipe], sources: Mapping[str, BatchSource], tokens: int, memory: int) -> None:
    for name, recipe in recipes.items():
        try:
            check_recipe(recipe, sources[recipe.source].d_in, memory)
            _check_snapshots(recipe, tokens)
        except ConfigError as error:
            raise (ConfigError(f"{name}: {error}") if len(recipes) > 1 else error) from None


def check_recipe(recipe: Recipe, d_in: int, memory: int) -> None:
    """Whether a dictionary can be trained as its recipe says; nothing of its size is made.

    Args:
        recipe: of the dictionary.
        d_in: width of its input.
        memory: bytes that the device has.

    Raises:
        ConfigError: settings that contradict each other or have no effect; too little memory; frozen names or a start
            that do not fit.
    """
    shape, settings = recipe.dictionary, recipe.settings
    check_memory(d_in, shape, memory)
    check_fit(shape, settings)
    check_read(shape, settings)
    with torch.device("meta"):
        dictionary = build(shape, d_in)
    freeze_(dictionary, settings.freeze)
    check_start(recipe, dictionary)


def _check_snapshots(recipe: Recipe, tokens: int) -> None:
    settings = recipe.settings
    late = [at for at in settings.snapshots if at > tokens]
    if late:
        raise ConfigError(f"train.snapshots has {late[0]:,}, and training ends after {tokens:,} tokens: take it out")
    if settings.snapshots and recipe.folder is None:
        raise ConfigError("train.snapshots needs a folder to save them in: give one, or take it out")
