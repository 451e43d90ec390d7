"""Harvests a language model's activations into a cache; resumable after being killed at any moment."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor

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
from sae.activations.same_model import check_same_as_before, load_shard
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
from sae.activations.space import check_space, stored_shards
from sae.activations.tokens import eligible_rows
from sae.config.mixture import tokens_by_source
from sae.config.progress import StageProgress
from sae.config.settings import RunConfig
from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, SPLITS, TRAIN
from sae.console.terminal import complain
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import CacheError, DataError
from sae.files.printable import json_text, one_line, printable
from sae.files.writing import locked, stands, write_bytes
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import STREAMS
from sae.text.census import Census, combined
from sae.text.packing import READING, Packer, packed_shards

_SHARDS_IN_FLIGHT = 2
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
            if not all(manifest.is_whole(folder, name) for name in manifest.files if _is_text(name)):
                _write_text(folder, config, language_model, manifest.files, manifest.data)
        else:
            widths = hook_widths(config, language_model)
            check_space(folder, config, widths)
            manifest = _begin(folder, config, language_model, widths)
        check_space(folder, config, {hook: entry.d_in for hook, entry in manifest.hooks.items()}, manifest)
        _Harvester(folder, manifest, language_model, config.harvest.batch_contexts, progress).run()
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
        files[name] = _write(folder, name, save(tensors), len(packed.tokens), expected.get(name))
        counts[split] += 1
        document_rows[split].update(packed.documents.tolist())
    names = {split: packer.names for split, packer in packers.items()}
    content = (json.dumps(names, indent=1, ensure_ascii=False) + "\n").encode()
    files[DOCUMENTS] = _write(folder, DOCUMENTS, content, sum(map(len, names.values())), expected.get(DOCUMENTS))
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
        model=language_model.info.to_json(),
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
    _write_manifest(folder, manifest)
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


class _Harvester:
    """Second stage: run the model on one shard after another, and write files in the background.

    A shard is recorded in the manifest, in order, only after its files are on disk, so sums and files always agree.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        model: LanguageModel,
        batch_contexts: int,
        progress: StageProgress | None,
    ) -> None:
        self.folder, self.manifest, self.model = folder, manifest, model
        self.batch_contexts, self.progress = batch_contexts, progress
        self.policy = TokenPolicy.from_json(manifest.tokens)
        self.total = sum(map(manifest.stored_rows, SPLITS))
        self.done = 0

    def run(self) -> None:
        self._advance(self._rows_on_disk())
        writing: deque[tuple[list[tuple[str, Future[FileEntry]]], dict[str, tuple[Tensor, float, int]]]] = deque()
        with ThreadPoolExecutor(2) as pool:
            for split, number in self._shards():
                columns = load_shard(self.folder, self.manifest, shard_name("tokens", split, number))
                tokens = columns["tokens"].long()
                names = {hook: shard_name(hook, split, number) for hook in self.manifest.hooks}
                missing = {hook: name for hook, name in names.items() if not self.manifest.is_whole(self.folder, name)}
                if not missing:
                    continue
                stored, sums = self._forward(tokens, columns.get("counted"), split)
                futures = [(name, pool.submit(self._write, name, stored[hook])) for hook, name in missing.items()]
                writing.append((futures, sums))
                if len(writing) > _SHARDS_IN_FLIGHT:
                    self._record(*writing.popleft())
            while writing:
                self._record(*writing.popleft())
        if not self.manifest.complete:
            self.manifest.complete = True
            _write_manifest(self.folder, self.manifest)

    def _rows_on_disk(self) -> int:
        """Rows of shards that an earlier process wrote."""
        return sum(
            self.manifest.shard_rows(split, number)
            for split, number in self._shards()
            if all(self.manifest.is_whole(self.folder, shard_name(h, split, number)) for h in self.manifest.hooks)
        )

    def _shards(self) -> Iterator[tuple[str, int]]:
        for split in SPLITS:
            for number in self.manifest.stored_shards(split):
                yield split, number

    def _write(self, name: str, tensors: dict[str, Tensor]) -> FileEntry:
        rows = len(tensors["activations"])
        return _write(self.folder, name, save(tensors), rows, self.manifest.files.get(name))

    def _forward(
        self, tokens: Tensor, counted: Tensor | None, split: str
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, tuple[Tensor, float, int]]]:
        """A shard's activations in stored form, and each hook point's sums over eligible training tokens."""
        hooks, length = list(self.manifest.hooks), self.manifest.context_length
        eligible = eligible_rows(tokens, self.policy, length, counted)
        stored = {hook: _empty(len(tokens), self.manifest.hooks[hook].d_in, self.manifest.dtype) for hook in hooks}
        sums = {hook: (torch.zeros(self.manifest.hooks[hook].d_in, dtype=torch.float64), 0.0, 0) for hook in hooks}
        step = self.batch_contexts * length
        full = len(tokens) // length * length
        ranges = [(start, min(start + step, full)) for start in range(0, full, step)]
        ranges += [(full, len(tokens))] if full < len(tokens) else []
        for start, stop in ranges:
            batch = tokens[start:stop].view(-1, min(length, stop - start)).to(self.model.device)
            for hook, x in self.model.activations(batch, hooks).items():
                rows = x.flatten(0, 1)
                self._store(stored[hook], start, rows, hook)
                if split == TRAIN:
                    sums[hook] = _add_sums(sums[hook], rows, eligible[start:stop])
            self._advance(stop - start)
        return stored, sums

    def _store(self, stored: dict[str, Tensor], start: int, rows: Float[Tensor, "rows d_in"], hook: str) -> None:
        stop = start + len(rows)
        if "scale" in stored:
            scale = (rows.abs().amax(-1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
            stored["scale"][start:stop] = scale
            finite = bool(scale.isfinite().all())
            rows = (rows / scale[:, None]).round() if finite else rows
        else:
            converted = rows.to(stored["activations"].dtype)
            finite, rows = bool(converted.isfinite().all()), converted
        if not finite:
            raise CacheError(not_finite(hook, self.manifest, bool(rows.float().isnan().any())))
        stored["activations"][start:stop] = rows

    def _record(self, futures: list[tuple[str, Future[FileEntry]]], sums: dict[str, tuple[Tensor, float, int]]) -> None:
        """Record a written shard in the manifest, unless it was already recorded and only its files were restored."""
        recorded = all(name in self.manifest.files for name, _ in futures)
        written = {name: future.result() for name, future in futures}
        if not recorded:
            self.manifest.files |= written
            for hook, (total, squares, count) in sums.items():
                entry = self.manifest.hooks[hook]
                previous = torch.tensor(entry.sum, dtype=torch.float64) if entry.sum else torch.zeros_like(total)
                entry.sum = (previous + total).tolist()
                entry.sum_of_squares += squares
                entry.tokens += count
            _write_manifest(self.folder, self.manifest)

    def _advance(self, tokens: int) -> None:
        self.done += tokens
        if self.progress:
            self.progress(self.done, self.total)


def _add_sums(
    sums: tuple[Tensor, float, int], rows: Float[Tensor, "rows d_in"], eligible: Bool[Tensor, " rows"]
) -> tuple[Tensor, float, int]:
    total, squares, count = sums
    x = rows[eligible.to(rows.device)].double()
    return total + x.sum(0).cpu(), squares + float(x.square().sum()), count + len(x)


def _empty(rows: int, d_in: int, dtype: str) -> dict[str, Tensor]:
    tensors = {"activations": torch.empty(rows, d_in, dtype=getattr(torch, dtype))}
    return {**tensors, "scale": torch.empty(rows)} if dtype == "int8" else tensors


def _write(folder: Path, name: str, content: bytes, rows: int, expected: FileEntry | None) -> FileEntry:
    """Write a file of the cache. A restored file must equal the lost one."""
    entry = FileEntry(rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    if expected is not None and entry != expected:
        cause = (
            "the text has changed, or this version reads it differently"
            if _is_text(name)
            else "other hardware, library versions or harvest.batch_contexts"
        )
        raise CacheError(
            f"cache {str(folder)!r}: {name} was made again and differs from its checksum ({cause}); "
            "delete the cache and harvest it again"
        )
    write_bytes(folder / name, content, hashed=False)  # its hash is in the manifest
    return entry


def _is_text(name: str) -> bool:
    return name == DOCUMENTS or name.startswith("tokens/")


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    manifest.files = dict(sorted(manifest.files.items()))
    write_bytes(folder / MANIFEST, (json_text(manifest.to_json(), indent=1) + "\n").encode())


def not_finite(hook: str, manifest: Manifest, is_nan: bool) -> str:
    """The problem with activations that are NaN or infinite in the cache's number type, and the way out."""
    if not is_nan and manifest.dtype == "float16":
        return (
            f"hook {hook!r}: activations exceed what float16 can hold (65,504); "
            "set harvest.dtype=bfloat16 (and harvest.cache to a new folder)"
        )
    return f"hook {hook!r}: {model_not_finite(manifest.model.get('dtype'))}"


def model_not_finite(dtype: str | None) -> str:
    """Advice about a model that gives NaN or infinity, for the number type that it computes in."""
    problem = "the model gives values that are not finite (NaN or infinity)"
    if dtype == "float32":
        return f"{problem} although it computes in float32: check the model's weights"
    return f"{problem}: set model.dtype=float32 (it is {dtype}), and check the model's weights"
