"""Checks that everything a run writes fits on the disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sae.activations.space import cache_bytes
from sae.config.settings import RunConfig
from sae.errors import CacheError
from sae.files.writing import missing_space
from sae.training.checkpoint import training_bytes
from sae.training.recipe import build


def check_disk(config: RunConfig, widths: Mapping[str, int], *, is_trained: bool) -> None:
    """Check before the harvest that everything the run writes fits on the disk.

    Args:
        config: the run's configuration.
        widths: widths of the hook points.
        is_trained: whether the dictionary already exists.

    Raises:
        CacheError: activations, checkpoints and dictionary need more than the free space.
    """
    folder = config.cache_folder
    with torch.device("meta"):
        sites = tuple(widths[hook] for hook in config.reads)
        is_transcoder = not config.is_crosscoder and config.gives != config.hook
        d_out = widths[config.gives] if is_transcoder else None
        dictionary = build(config.dictionary, sum(sites), d_out, sites if config.is_crosscoder else ())
    weights = 4 * sum(parameter.numel() for parameter in dictionary.parameters())
    training = 0 if is_trained else training_bytes(weights, 3 * weights, config.train.keep_checkpoints)
    cached = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if short := missing_space({folder: cache_bytes(config, widths) - cached, config.folder: training}):
        raise CacheError(
            f"disk full: {short}, for the activations of {config.data.tokens + config.data.held_out_tokens:,} "
            f"tokens and {training / 1e9:,.2f} GB of checkpoints: free some space, or use harvest.dtype=int8, "
            "fewer data.tokens or a larger disk (out=..., harvest.cache=...)"
        )
