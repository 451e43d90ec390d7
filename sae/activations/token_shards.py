"""The first stage of a harvest: text is read, tokenised and written as token shards."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from sae.activations.manifest import DOCUMENTS, PLAIN_COLUMNS, FileEntry, shard_name
from sae.activations.same_request import TEXT_STREAMS, TOKEN_COLUMNS, reading_version
from sae.activations.shards import write_entry
from sae.config.mixture import tokens_by_source
from sae.config.settings import RunConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.errors import CacheError
from sae.model.language_model import LanguageModel
from sae.text.census import Census
from sae.text.packing import READING, Packer, packed_shards


@dataclass(frozen=True)
class WrittenText:
    """A text on disk.

    Attributes:
        files: its files, by name.
        source_tokens: number of rows from each source, by split, if there are several.
        census: what was skipped or special in each source.
    """

    files: dict[str, FileEntry]
    source_tokens: dict[str, dict[str, int]]
    census: tuple[Census, ...]


def write_text(
    folder: Path, config: RunConfig, language_model: LanguageModel, expected: dict[str, FileEntry],
    versions: dict[str, Any],
) -> WrittenText:  # fmt: skip
    """Write a text as token shards and document names. Starts over if interrupted.

    Args:
        folder: the cache.
        config: settings of the text.
        language_model: its tokenizer is used.
        expected: files that were lost, which the written ones must equal.
        versions: columns, and versions of reading and of random streams; the `data` of a manifest has them.

    Raises:
        CacheError: a file cannot be written, or is not as expected.
        DataError: the text cannot be read, or is too short.
    """
    data = config.data
    bos = language_model.bos if data.prepend_bos else None
    rows = {TRAIN: data.tokens, HELD_OUT: data.held_out_tokens}
    packers = {split: Packer(rows[split], data.context_length, bos, language_model.separator) for split in SPLITS}
    files: dict[str, FileEntry] = {}
    counts = dict.fromkeys(SPLITS, 0)
    document_rows: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
    shard_contexts, columns = config.harvest.shard_contexts, versions.get(TOKEN_COLUMNS, PLAIN_COLUMNS)
    census = [Census() for _ in data.sources]
    reading = reading_version(versions)
    if reading not in range(READING + 1):
        raise CacheError(
            f"cache {str(folder)!r}: its manifest has reading={reading!r}, but this version knows 0 to {READING}: "
            "restore it with the version that wrote it, or delete the cache and harvest it again"
        )
    for split, packed in packed_shards(
        data,
        language_model.tokenizer,
        shard_contexts,
        packers,
        versions.get(TEXT_STREAMS, 1),
        census,
        reading,
        language_model.rows,
    ):
        name = shard_name("tokens", split, counts[split])
        tensors = {column: torch.from_numpy(getattr(packed, column)) for column in columns}
        files[name] = write_entry(folder, name, [save(tensors)], len(packed.tokens), expected.get(name))
        counts[split] += 1
        document_rows[split].update(packed.documents.tolist())
    names = {split: packer.names for split, packer in packers.items()}
    content = (json.dumps(names, indent=1, ensure_ascii=False) + "\n").encode()
    files[DOCUMENTS] = write_entry(folder, DOCUMENTS, [content], sum(map(len, names.values())), expected.get(DOCUMENTS))
    several = SPLITS if len(data.sources) > 1 else ()
    source_tokens = {split: tokens_by_source(data.labels, names[split], document_rows[split]) for split in several}
    return WrittenText(dict(sorted(files.items())), source_tokens, tuple(census))
