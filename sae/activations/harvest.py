"""Harvests a language model's activations into a cache; resumable after being killed at any moment."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from sae.activations.cache import ActivationCache
from sae.activations.manifest import (
    FORMAT,
    MANIFEST,
    WHOLE_VERSION,
    HookEntry,
    Manifest,
    read_manifest,
)
from sae.activations.same_model import READER, check_same_as_before
from sae.activations.same_request import (
    TEXT_READING,
    TEXT_STREAMS,
    TOKEN_COLUMNS,
    check_same_request,
    data_identity,
    token_columns,
    where_from,
)
from sae.activations.shards import Harvester, is_text, write_manifest
from sae.activations.space import check_space, stored_shards
from sae.activations.token_shards import write_text
from sae.config.progress import StageProgress
from sae.config.settings import RunConfig
from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.console.terminal import complain
from sae.errors import DataError
from sae.files.printable import one_line, printable
from sae.files.writing import locked, stands
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import STREAMS
from sae.text.census import Census, combined
from sae.text.packing import READING

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
                write_text(folder, config, language_model, manifest.files, manifest.data)
        else:
            manifest = _new_manifest(config, language_model, hook_widths(config, language_model))
            check_space(folder, config, manifest)
            _announce_sample(config, manifest)
            _write_new_text(folder, config, language_model, manifest)
        check_space(folder, config, manifest)
        Harvester(folder, manifest, language_model, config.harvest.batch_contexts, progress).run()
    return ActivationCache(folder)


def _announce_sample(config: RunConfig, manifest: Manifest) -> None:
    """Tell the user if the sample of a live harvest is the whole text."""
    if config.harvest.live and manifest.stored_rows(TRAIN) == config.data.tokens:
        shard = config.harvest.shard_contexts * config.data.context_length
        complain(
            f"harvest.live=true: a sample of {config.harvest.stored_training_tokens:,} tokens, in shards of {shard:,}, "
            f"covers all {config.data.tokens:,} for training, so all activations are stored; lower "
            "harvest.sample_tokens, and harvest.shard_contexts if shards are large, to store less"
        )


def _new_manifest(config: RunConfig, language_model: LanguageModel, widths: dict[str, int]) -> Manifest:
    """The manifest of a harvest before its text is written."""
    data, harvest_config = config.data, config.harvest
    policy = language_model.token_policy(
        prepend_bos=data.prepend_bos,
        masked_positions=harvest_config.masked_positions,
        mask_special_tokens=harvest_config.mask_special_tokens,
    )
    policy = dataclasses.replace(policy, chat_roles=data.chat_roles)
    stored = stored_shards(config)
    return Manifest(
        format_version=WHOLE_VERSION if stored is None else FORMAT.version,
        model={**language_model.info.to_json(), READER: language_model.reader(harvest_config.hooks)},
        data={
            **data_identity(data),
            **({TEXT_STREAMS: STREAMS} if data.shuffle_documents else {}),
            TOKEN_COLUMNS: token_columns(data),
            TEXT_READING: READING,
        },
        tokens={**policy.to_json(), "mask_special_tokens": harvest_config.mask_special_tokens},
        context_length=data.context_length,
        shard_contexts=harvest_config.shard_contexts,
        dtype=harvest_config.dtype,
        rows={TRAIN: data.tokens, HELD_OUT: data.held_out_tokens},
        stored=stored,
        text_sha256="",
        hooks={hook: HookEntry(d_in=widths[hook]) for hook in harvest_config.hooks},
        files={},
    )


def _write_new_text(folder: Path, config: RunConfig, language_model: LanguageModel, manifest: Manifest) -> None:
    """First stage: write everything except activations, the manifest last."""
    data = config.data
    versions = {TEXT_STREAMS: STREAMS, TOKEN_COLUMNS: token_columns(data), TEXT_READING: READING}
    text = write_text(folder, config, language_model, {}, versions)
    _check_roles(data, text.census)
    for label, census in zip(data.labels, text.census, strict=True):
        for line in census.lines(label, chose_unit=data.holdout_by is not None):
            complain(line)
    manifest.files = text.files
    manifest.text_sha256 = hashlib.sha256("".join(entry.sha256 for entry in text.files.values()).encode()).hexdigest()
    manifest.data |= {
        **combined(text.census),
        **where_from(data),
        **({"source_tokens": text.source_tokens} if text.source_tokens else {}),
    }
    write_manifest(folder, manifest)


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
