"""Write a feature store: the collected statistics and examples, logits, neighbours, and the scanned tokens."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.config.settings import FeaturesConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.neighbours import Neighbours
from sae.dictionary.saved import weights_sha256
from sae.features import layout
from sae.features.examples import Examples
from sae.features.logits import LogitEffects
from sae.features.store import Features
from sae.files.writing import json_content, tensors_content
from sae.model.vocabulary import Vocabulary


@dataclass(frozen=True)
class Collected:
    """Statistics and examples of every feature from one pass.

    Attributes:
        rows: number of tokens scanned, including masked ones.
        tokens: number of eligible tokens among them.
        count: number of tokens on which the feature fired.
        mean: mean of its non-zero activations; 0 if it never fired.
        max: the largest activation.
        histogram: number of non-zero activations between adjacent `edges`.
        edges: bin edges; the first and last bin also hold everything beyond.
        examples: the firings kept.
        document_start: first row of each run of rows of one document.
        document: the document each run belongs to.
        one_per: `document` or `section`: the unit that gives at most one of a feature's strongest examples.
    """

    rows: int
    tokens: int
    count: Int[np.ndarray, " d_sae"]
    mean: Float[np.ndarray, " d_sae"]
    max: Float[np.ndarray, " d_sae"]
    histogram: Int[np.ndarray, "d_sae bins"]
    edges: Float[np.ndarray, " edges"]
    examples: Examples
    document_start: Int[np.ndarray, " runs"]
    document: Int[np.ndarray, " runs"]
    one_per: str = "document"


def write_store(
    folder: Path,
    dictionary: Dictionary,
    cache: ActivationCache,
    collected: Collected,
    settings: FeaturesConfig,
    *,
    split: str,
    hook: str,
    seed: int,
    vocabulary: Vocabulary,
    logits: LogitEffects | None,
    neighbours: Neighbours,
) -> Features:
    """Write all files, `features.json` last: a folder without it is not a store.

    Raises:
        CacheError: the folder cannot be written.
    """
    used = int(collected.document.max(initial=-1)) + 1
    files = {
        layout.COLUMNS: (tensors_content(part) for part in [_columns(collected, logits, neighbours)]),
        layout.TOKENS: _tokens(cache, split, collected),
        layout.DOCUMENTS: json_content(cache.documents(split)[:used]),
        layout.VOCABULARY: json_content(vocabulary.to_json()),
    }
    record = {
        "d_sae": dictionary.d_sae,
        "hook": hook,
        "split": split,
        "model": cache.manifest.model.get("name"),
        "dictionary_sha256": weights_sha256(dictionary),
        "activations": cache.manifest.identity(hook),
        "rows": collected.rows,
        "tokens": collected.tokens,
        "context_length": cache.context_length,
        "one_example_per": collected.one_per,
        "seed": seed,
        "settings": settings.model_dump(),
        "histogram_edges": [float(f"{edge:.6g}") for edge in collected.edges],
        "columns": layout.MEANINGS,
    }
    layout.STORE.write(folder, record, files)
    return Features(folder)


def _columns(collected: Collected, logits: LogitEffects | None, neighbours: Neighbours) -> dict[str, Tensor]:
    columns = {
        "count": torch.from_numpy(collected.count),
        "mean": torch.from_numpy(collected.mean),
        "max": torch.from_numpy(collected.max),
        "histogram": torch.from_numpy(_narrow(collected.histogram)),
        "neighbour": neighbours.index.int(),
        "neighbour_cosine": neighbours.cosine.float(),
        **_example_columns(collected.examples, len(collected.count)),
    }
    if logits is not None:
        columns |= {
            "promoted": logits.promoted.int(),
            "promoted_logits": logits.promoted_logits,
            "suppressed": logits.suppressed.int(),
            "suppressed_logits": logits.suppressed_logits,
        }
    return {name: tensor.contiguous() for name, tensor in columns.items()}


def _example_columns(examples: Examples, d_sae: int) -> dict[str, Tensor]:
    """Columns of the examples; of their windows, only the non-zero activations."""
    example, offset = np.nonzero(examples.window)
    columns = {
        "example_start": np.searchsorted(examples.feature, np.arange(d_sae + 1)),
        "example_group": _narrow(examples.group, small=True),
        "example_row": _narrow(examples.row),
        "example_value": examples.value,
        "window_count": _narrow(np.bincount(example, minlength=len(examples.row)), small=True),
        "window_offset": _narrow(offset, small=True),
        "window_value": examples.window[example, offset],
    }
    return {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}


def _narrow(column: np.ndarray, *, small: bool = False) -> np.ndarray:
    """Non-negative integers in 4 bytes if they fit, or in 1 byte if `small` and they fit."""
    largest = int(column.max(initial=0))
    if small and largest < 1 << 8:
        return column.astype(np.uint8)
    return column.astype(np.int32 if largest < 1 << 31 else np.int64)


def _tokens(cache: ActivationCache, split: str, collected: Collected) -> Iterator[bytes]:
    """The content of a safetensors file, piece by piece: the scanned text need not fit into memory."""
    runs, end, header = len(collected.document), 0, {}
    for name, kind, size, length in (
        ("document_start", "I64", 8, runs), ("document", "I32", 4, runs), ("tokens", "I32", 4, collected.rows)
    ):  # fmt: skip
        header[name] = {"dtype": kind, "shape": [length], "data_offsets": [end, end + size * length]}
        end += size * length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    yield collected.document_start.astype("<i8").tobytes()
    yield collected.document.astype("<i4").tobytes()
    for batch in cache.contexts(split, batch_contexts=4096, max_tokens=collected.rows):
        yield batch.tokens.numpy().astype("<i4").tobytes()
