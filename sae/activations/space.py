"""The disk space that a cache needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sae.activations.manifest import Manifest
from sae.config.settings import RunConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.errors import CacheError
from sae.files.writing import free_bytes

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_BYTES_OF_TEXT = 8  # a token's id and the index of its document


def stored_shards(config: RunConfig) -> dict[str, list[int]] | None:
    """Numbers of the shards, by split, whose activations `config` asks to store; None: all.

    A live harvest stores those of all held-out tokens, and of `harvest.sample_tokens` training tokens or a few more, in
    whole shards that are spread evenly over the text.
    """
    if not config.harvest.live:
        return None
    size = config.harvest.shard_contexts * config.data.context_length
    shards, held_out = (-(-tokens // size) for tokens in (config.data.tokens, config.data.held_out_tokens))
    chosen = min(-(-config.harvest.stored_training_tokens // size), shards)
    return {TRAIN: [number * shards // chosen for number in range(chosen)], HELD_OUT: list(range(held_out))}


def stored_tokens(config: RunConfig, split: str) -> int:
    """Number of tokens of a split whose activations `config` asks to store."""
    rows, stored = {TRAIN: config.data.tokens, HELD_OUT: config.data.held_out_tokens}[split], stored_shards(config)
    size = config.harvest.shard_contexts * config.data.context_length
    return rows if stored is None else sum(min(size, rows - number * size) for number in stored[split])


def cache_bytes(config: RunConfig, widths: Mapping[str, int]) -> int:
    """Bytes of the activations, tokens and document indices that `config` asks for."""
    data, dtype = config.data, config.harvest.dtype
    per_row = sum(widths.values()) * _BYTES[dtype] + 4 * len(widths) * (dtype == "int8")
    stored = sum(stored_tokens(config, split) for split in SPLITS)
    return stored * per_row + (data.tokens + data.held_out_tokens) * _BYTES_OF_TEXT


def check_space(folder: Path, config: RunConfig, manifest: Manifest) -> None:
    """Raise CacheError if the bytes still to be written exceed the free space."""
    written = sum(manifest.files[name].bytes for name in manifest.files if manifest.is_whole(folder, name))
    widths = {hook: entry.d_in for hook, entry in manifest.hooks.items()}
    needed, free = cache_bytes(config, widths) - written, free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"disk full: cache {str(folder)!r} needs {needed / 1e9:,.2f} GB more, {free / 1e9:,.2f} GB are free: "
            "existing files are kept: free some space and run the same command again, or use harvest.live=true, "
            "harvest.dtype=int8 or fewer data.tokens in another folder"
        )
