"""Harvests a language model's activations into a cache; resumable after being killed at any moment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from sae.activations.cache import ActivationCache
from sae.activations.manifest import (
    DOCUMENTS,
    MANIFEST,
    PLAIN_COLUMNS,
    FileEntry,
    HookEntry,
    Manifest,
    read_manifest,
    shard_name,
)
from sae.activations.same_model import READER, check_same_as_before
from sae.activations.same_request import (
    TEXT_READING,
    TEXT_STREAMS,
    TOKEN_COLUMNS,
    check_same_request,
    data_identity,
    reading_version,
    token_columns,
    where_from,
)
from sae.activations.shards import Harvester, is_text, write_entry, write_manifest
from sae.activations.space import check_space, stored_shards
from sae.config.mixture import tokens_by_source
from sae.config.progress import StageProgress
from sae.config.settings import RunConfig
from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.console.terminal import complain
from sae.errors import CacheError, DataError
from sae.files.printable import one_line, printable
from sae.files.writing import locked, stands
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import STREAMS
from sae.text.census import Census, combined
from sae.text.packing import READING, Packer, packed_shards

_ROLES_SHOWN, _LONGEST = 8, 200


@in_own_modes
def harvest(config: RunConfig, language_model: LanguageModel, progress: StageProgress | None = None) -> ActivationCache:
    """Cache the activations that `config` asks for, or resume an interrupted harvest.

    Args:
        config: its `model`, `data` and `harvest` sections and the cache folder are used.
        language_model: the model named in `config.model`.
        progress: called with (tokens done, tokens in total).

    Raises:
        CacheError: the folder holds another cache, cannot be written or is full; activations overflow the number type.
        DataError: the text cannot be read, or is too short.
        ModelError: a hook point does not exist, or contexts are longer than the model can read.
    """
    folder = config.cache_folder
    for hook in config.harvest.hooks:
        language_model.check_hook(hook)
    language_model.check_context_length(config.data.context_length)
    with locked(folder, "harvest"):
        if stands(folder / MANIFEST):
            manifest = read_manifest(folder)
            check_same_request(folder, manifest, config, text=True)
            check_same_as_before(folder, manifest, language_model)
            if not all(manifest.is_whole(folder, name) for name in manifest.files if is_text(name)):
                _write_text(folder, config, language_model, manifest.files, manifest.data)
        else:
            widths = hook_widths(config, language_model)
            check_space(folder, config, widths)
            manifest = _begin(folder, config, language_model, widths)
        check_space(folder, config, {hook: entry.d_in for hook, entry in manifest.hooks.items()}, manifest)
        Harvester(folder, manifest, language_model, config.harvest.batch_contexts, progress).run()
    return ActivationCache(folder)


@dataclass(frozen=True)
class _Text:
    """The text as written; `source_tokens` is the number of rows from each of several sources, by split."""

    files: dict[str, FileEntry]
    source_tokens: dict[str, dict[str, int]]
    census: tuple[Census, ...]


def _write_text(
    folder: Path, config: RunConfig, language_model: LanguageModel, expected: dict[str, FileEntry],
    versions: dict[str, Any],
) -> _Text:  # fmt: skip
    """Write the text as token shards and document names. Starts over if interrupted.

    `versions` has the columns and the versions of reading and random streams; the `data` of a manifest has them.
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
    return _Text(dict(sorted(files.items())), source_tokens, tuple(census))


def _begin(folder: Path, config: RunConfig, language_model: LanguageModel, widths: dict[str, int]) -> Manifest:
    """First stage: write everything except activations, the manifest last."""
    data, harvest_config = config.data, config.harvest
    policy = language_model.token_policy(
        prepend_bos=data.prepend_bos,
        masked_positions=harvest_config.masked_positions,
        mask_special_tokens=harvest_config.mask_special_tokens,
    )
    policy = dataclasses.replace(policy, chat_roles=data.chat_roles)
    versions = {TEXT_STREAMS: STREAMS, TOKEN_COLUMNS: token_columns(data), TEXT_READING: READING}
    text = _write_text(folder, config, language_model, {}, versions)
    _check_roles(data, text.census)
    for label, census in zip(data.labels, text.census, strict=True):
        for line in census.lines(label, chose_unit=data.holdout_by is not None):
            complain(line)
    text_sha256 = hashlib.sha256("".join(entry.sha256 for entry in text.files.values()).encode()).hexdigest()
    manifest = Manifest(
        model={**language_model.info.to_json(), READER: language_model.reader(harvest_config.hooks)},
        data={
            **data_identity(data),
            **({TEXT_STREAMS: STREAMS} if data.shuffle_documents else {}),
            TOKEN_COLUMNS: token_columns(data),
            TEXT_READING: READING,
            **combined(text.census),
            **where_from(data),
            **({"source_tokens": text.source_tokens} if text.source_tokens else {}),
        },
        tokens={**policy.to_json(), "mask_special_tokens": harvest_config.mask_special_tokens},
        context_length=data.context_length,
        shard_contexts=harvest_config.shard_contexts,
        dtype=harvest_config.dtype,
        rows={TRAIN: data.tokens, HELD_OUT: data.held_out_tokens},
        stored=stored_shards(config),
        text_sha256=text_sha256,
        hooks={hook: HookEntry(d_in=widths[hook]) for hook in harvest_config.hooks},
        files=text.files,
    )
    write_manifest(folder, manifest)
    return manifest


def _check_roles(data: DataConfig, census: Sequence[Census]) -> None:
    """Raise DataError if no chat has a role in `data.chat_roles`, since no token would count."""
    roles = sum((part.roles for part in census), Counter[str]())
    if data.chat_roles is None or not roles or any(role in roles for role in data.chat_roles):
        return
    listed = ", ".join(role for role, _ in roles.most_common(_ROLES_SHOWN)) + (
        ", …" if len(roles) > _ROLES_SHOWN else ""
    )
    chosen = ", ".join(data.chat_roles)
    raise DataError(
        f"chats have the roles {printable(one_line(listed, _LONGEST))}; data.chat_roles=[{chosen}] names none of them: "
        "name at least one, or set data.chat_roles=null to count all"
    )


@in_own_modes
def hook_widths(config: RunConfig, language_model: LanguageModel) -> dict[str, int]:
    """Width of the activations at each hook point."""
    example = torch.zeros(1, 2, dtype=torch.long, device=language_model.device)
    return {hook: x.shape[-1] for hook, x in language_model.activations(example, config.harvest.hooks).items()}
