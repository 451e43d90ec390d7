"""The disk space that a cache needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sae.activations.manifest import Manifest
from sae.config.settings import RunConfig
from sae.errors import CacheError
from sae.files.writing import free_bytes

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_BYTES_OF_TEXT = 8  # a token's id and the index of its document


def cache_bytes(config: RunConfig, widths: Mapping[str, int]) -> int:
    """Bytes of the activations, tokens and document indices that `config` asks for."""
    data, dtype = config.data, config.harvest.dtype
    per_row = sum(widths.values()) * _BYTES[dtype] + 4 * len(widths) * (dtype == "int8") + _BYTES_OF_TEXT
    return (data.tokens + data.held_out_tokens) * per_row


def check_space(folder: Path, config: RunConfig, widths: Mapping[str, int], manifest: Manifest | None = None) -> None:
    """Raise CacheError if the bytes still to be written exceed the free space."""
    written = 0
    if manifest is not None:
        written = sum(manifest.files[name].bytes for name in manifest.files if manifest.is_whole(folder, name))
    needed, free = cache_bytes(config, widths) - written, free_bytes(folder)
    if needed > free:
        raise CacheError(
            f"disk full: cache {str(folder)!r} needs {needed / 1e9:,.2f} GB more, {free / 1e9:,.2f} GB are free: "
            "existing files are kept: free some space and run the same command again, or use harvest.dtype=int8 or "
            "fewer data.tokens in another folder"
        )
