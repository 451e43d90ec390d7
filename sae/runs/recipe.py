"""The recipe of a run's dictionary, from its configuration; and a check of it before the harvest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from sae.activations.cache import ActivationCache
from sae.activations.metadata import dictionary_metadata
from sae.config.settings import RunConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.sites import Site, Sites, check_order
from sae.training.check import check_recipe
from sae.training.joined import JoinedSource
from sae.training.recipe import Recipe
from sae.training.source import BatchSource


def run_recipe(config: RunConfig, cache: ActivationCache, start: Dictionary | None, folder: Path) -> Recipe:
    """The recipe of a run's dictionary.

    Args:
        config: the run's configuration.
        cache: the run's cache.
        start: the dictionary of `train.start_from`.
        folder: the run folder.
    """
    target = None if config.is_crosscoder or config.gives == config.hook else config.gives
    return Recipe(
        config.dictionary, config.train, config.seed, config.source_name, target, folder=folder,
        metadata=dictionary_metadata(cache, config.reads, target), start=start,
    )  # fmt: skip


def with_joined(sources: Mapping[str, BatchSource], configs: Iterable[RunConfig]) -> dict[str, BatchSource]:
    """The sources, and for each crosscoder one that joins those of its hook points, by the name in its recipe."""
    joined = {
        config.source_name: JoinedSource([sources[hook] for hook in config.reads])
        for config in configs if config.is_crosscoder
    }  # fmt: skip
    return {**sources, **joined}


def check_run_recipe(config: RunConfig, start: Dictionary | None, memory: int) -> None:
    """Check a run's recipe before widths are known.

    Args:
        config: the run's configuration.
        start: the dictionary of `train.start_from`, from which they are taken.
        memory: the device's memory in bytes.

    Raises:
        ConfigError: for the reasons of `sae.training.check.check_recipe`.
    """
    recipe = Recipe(config.dictionary, config.train, start=start)
    if config.is_crosscoder:
        widths = (1,) * len(config.reads) if start is None else start.site_widths
        check_recipe(recipe, sum(widths) if start is None else start.d_in, None, memory, widths)
        return
    d_in, d_out = (1, 1) if start is None else (start.d_in, start.d_out)
    check_recipe(recipe, d_in, d_out if config.gives != config.hook else None, memory)


def check_sites(config: RunConfig) -> None:
    """Check that the model computes what a transcoder reads before what it gives.

    Raises:
        ConfigError: it does not.
    """
    reads = Sites(tuple(Site(hook) for hook in config.reads))
    check_order(reads, reads if config.is_crosscoder else Sites.one(config.gives))
