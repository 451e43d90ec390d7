"""Runs a model over the tokens of a cache and writes its activations, shard by shard."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor

from sae.activations.manifest import DOCUMENTS, MANIFEST, FileEntry, Manifest, shard_name
from sae.activations.same_model import load_shard
from sae.activations.tokens import eligible_rows
from sae.config.progress import StageProgress
from sae.config.splits import SPLITS, TRAIN
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import CacheError
from sae.files.printable import json_text
from sae.files.writing import write_bytes
from sae.model.language_model import LanguageModel

_SHARDS_IN_FLIGHT = 2


class Harvester:
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
        self.total = sum(manifest.rows.values())
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
            write_manifest(self.folder, self.manifest)

    def _rows_on_disk(self) -> int:
        """Rows of shards that an earlier process wrote."""
        size = self.manifest.shard_contexts * self.manifest.context_length
        return sum(
            min(size, self.manifest.rows[split] - number * size)
            for split, number in self._shards()
            if all(self.manifest.is_whole(self.folder, shard_name(h, split, number)) for h in self.manifest.hooks)
        )

    def _shards(self) -> Iterator[tuple[str, int]]:
        shard_rows = self.manifest.shard_contexts * self.manifest.context_length
        for split in SPLITS:
            for number in range(-(-self.manifest.rows[split] // shard_rows)):
                yield split, number

    def _write(self, name: str, tensors: dict[str, Tensor]) -> FileEntry:
        rows = len(tensors["activations"])
        return write_entry(self.folder, name, save(tensors), rows, self.manifest.files.get(name))

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
            raise CacheError(_not_finite(hook, self.manifest, bool(rows.float().isnan().any())))
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
            write_manifest(self.folder, self.manifest)

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


def write_entry(folder: Path, name: str, content: bytes, rows: int, expected: FileEntry | None) -> FileEntry:
    """Write a file of the cache. A restored file must equal the lost one."""
    entry = FileEntry(rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    if expected is not None and entry != expected:
        cause = (
            "the text has changed, or this version reads it differently"
            if is_text(name)
            else "other hardware, library versions or harvest.batch_contexts"
        )
        raise CacheError(
            f"cache {str(folder)!r}: {name} was made again and differs from its checksum ({cause}); "
            "delete the cache and harvest it again"
        )
    write_bytes(folder / name, content, hashed=False)  # its hash is in the manifest
    return entry


def is_text(name: str) -> bool:
    return name == DOCUMENTS or name.startswith("tokens/")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    manifest.files = dict(sorted(manifest.files.items()))
    write_bytes(folder / MANIFEST, (json_text(manifest.model_dump(), indent=1) + "\n").encode())


def _not_finite(hook: str, manifest: Manifest, is_nan: bool) -> str:
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
