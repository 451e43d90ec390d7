"""Runs a model over the tokens of a cache and writes its activations, shard by shard."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae.activations.manifest import DOCUMENTS, MANIFEST, FileEntry, Manifest, shard_name
from sae.activations.same_model import load_shard, reading_as_before
from sae.activations.shard_memory import ShardMemory
from sae.activations.tokens import batch_ranges, eligible_rows
from sae.config.progress import StageProgress
from sae.config.splits import SPLITS, TRAIN
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import CacheError
from sae.files.printable import json_text
from sae.files.tensor_pieces import tensor_pieces
from sae.files.writing import write_bytes, write_chunks
from sae.model.language_model import LanguageModel

_SHARDS_IN_FLIGHT, _WRITERS = 2, 4


@dataclass(frozen=True)
class _Shard:
    """A shard to compute: its split, its number, and the names of its missing files, by hook point."""

    split: str
    number: int
    missing: dict[str, str]


class Harvester:
    """Second stage: run the model on one shard after another, and write files in the background.

    While a shard is computed, the one or two before it are written. A shard is recorded in the manifest, in order, only
    after its files are on disk, so sums and files always agree.
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
        self.activations = model.activations
        self.total = sum(map(manifest.stored_rows, SPLITS))
        self.done = 0

    def run(self) -> None:
        shards = list(self._incomplete_shards())
        self._advance(self.total - sum(self._rows(shard) for shard in shards))
        widths = {hook: entry.d_in for hook, entry in self.manifest.hooks.items()}
        rows = max(map(self._rows, shards), default=0)
        unused: list[ShardMemory] = []
        recording: deque[Future[ShardMemory]] = deque()
        if shards:
            self.activations = reading_as_before(self.folder, self.manifest, self.model)
            _keep_freed_memory()
        with ThreadPoolExecutor(_WRITERS) as writers, ThreadPoolExecutor(1) as recorder:
            for shard in shards:
                while recording and (recording[0].done() or len(recording) > _SHARDS_IN_FLIGHT):
                    unused.append(recording.popleft().result())
                memory = unused.pop() if unused else ShardMemory(rows, widths, self.manifest.dtype, self.model.device)
                self._compute(shard, memory)
                files = {name: writers.submit(self._write, hook, name, memory) for hook, name in shard.missing.items()}
                before = recording[-1] if recording else None
                recording.append(recorder.submit(self._record, files, memory, before))
            for recorded in recording:
                recorded.result()
        if not self.manifest.complete:
            self.manifest.complete = True
            write_manifest(self.folder, self.manifest)

    def _incomplete_shards(self) -> Iterator[_Shard]:
        for split in SPLITS:
            for number in self.manifest.stored_shards(split):
                names = {hook: shard_name(hook, split, number) for hook in self.manifest.hooks}
                missing = {hook: name for hook, name in names.items() if not self.manifest.is_whole(self.folder, name)}
                if missing:
                    yield _Shard(split, number, missing)

    def _rows(self, shard: _Shard) -> int:
        return self.manifest.shard_rows(shard.split, shard.number)

    def _compute(self, shard: _Shard, memory: ShardMemory) -> None:
        """Have the model compute a shard's activations, and the sums of those that count in training."""
        columns = load_shard(self.folder, self.manifest, shard_name("tokens", shard.split, shard.number))
        hooks, length, tokens = list(self.manifest.hooks), self.manifest.context_length, columns["tokens"].long()
        counted = eligible_rows(tokens, self.policy, length, columns.get("counted")).nonzero().flatten()
        ranges = list(batch_ranges(len(tokens), length, self.batch_contexts))
        ends = torch.searchsorted(counted, torch.tensor([stop for _, stop in ranges])).tolist()
        tokens, counted = self._on_device(tokens), self._on_device(counted)
        memory.begin(len(tokens))
        for (start, stop), first, last in zip(ranges, [0, *ends], ends, strict=False):
            batch = tokens[start:stop].view(-1, min(length, stop - start))
            summed = counted[first:last] - start if shard.split == TRAIN else None
            for hook, x in self.activations(batch, hooks).items():
                memory.add(hook, start, x.flatten(0, 1), summed)
            self._advance(stop - start)
        memory.end()

    def _on_device(self, numbers: Tensor) -> Tensor:
        device = self.model.device
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)

    def _write(self, hook: str, name: str, memory: ShardMemory) -> FileEntry:
        memory.wait()
        tensors = memory.tensors(hook)
        stored = tensors["activations"]
        if not memory.is_finite(hook):
            raise CacheError(not_finite(hook, self.manifest, bool(stored.isnan().any())))
        expected = self.manifest.files.get(name)
        return write_entry(self.folder, name, tensor_pieces(tensors), len(stored), expected)

    def _record(
        self, files: dict[str, Future[FileEntry]], memory: ShardMemory, before: Future[ShardMemory] | None
    ) -> ShardMemory:
        """Record a shard in the manifest, unless it was already recorded and only its files were restored.

        Args:
            files: its files, by name.
            memory: its activations; returned, for another shard.
            before: the shard before it, which is recorded first.
        """
        if before is not None:
            before.result()
        recorded = all(name in self.manifest.files for name in files)
        written = {name: file.result() for name, file in files.items()}
        if not recorded:
            self.manifest.files |= written
            for hook, entry in self.manifest.hooks.items():
                total, squares, count = memory.sums(hook)
                previous = torch.tensor(entry.sum, dtype=torch.float64) if entry.sum else torch.zeros_like(total)
                entry.sum = (previous + total).tolist()
                entry.sum_of_squares += squares
                entry.tokens += count
            write_manifest(self.folder, self.manifest)
        return memory

    def _advance(self, tokens: int) -> None:
        self.done += tokens
        if self.progress:
            self.progress(self.done, self.total)


def _keep_freed_memory() -> None:
    """Have the C library keep the memory that a pass frees for the next one, which need not be cleared again then.

    glibc returns freed memory above a bound that follows the largest block freed so far, up to 32 MB.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)


def write_entry(
    folder: Path, name: str, pieces: Sequence[bytes | memoryview], rows: int, expected: FileEntry | None
) -> FileEntry:
    """Write a file of the cache, given in pieces. A restored file must equal the lost one."""
    size = sum(map(len, pieces))
    if expected is not None and FileEntry(rows=rows, bytes=size, sha256=_sha256(pieces)) != expected:
        cause = (
            "the text has changed, or this version reads it differently"
            if is_text(name)
            else "other hardware, library versions or harvest.batch_contexts"
        )
        raise CacheError(
            f"cache {str(folder)!r}: {name} was made again and differs from its checksum ({cause}); "
            "delete the cache and harvest it again"
        )
    sha256 = write_chunks(folder / name, pieces, hashed=False)  # its hash is in the manifest
    return FileEntry(rows=rows, bytes=size, sha256=sha256)


def _sha256(pieces: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def is_text(name: str) -> bool:
    return name == DOCUMENTS or name.startswith("tokens/")


def write_manifest(folder: Path, manifest: Manifest) -> None:
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
