"""The manifest of a cache: its contents, their origin, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt

from sae.config.splits import SPLITS
from sae.dictionary.model_identity import NOT_OF_ACTIVATIONS
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import CacheError, DamagedError
from sae.files.damage import damaged
from sae.files.formats import Format, fingerprint_of
from sae.files.hashes import check
from sae.files.paths import resolve
from sae.files.reading import read_object, validated

FORMAT = Format("sae-activations", 2)
WHOLE_VERSION = 1
"""The version of caches that store all activations, which older packages read."""
MANIFEST, DOCUMENTS = "manifest.json", "documents.json"
RESTORE = "delete it and run the same 'sae harvest' to restore it"
COLUMN_TYPES = {
    "tokens": torch.int32, "documents": torch.int32, "sections": torch.int32, "counted": torch.bool,
}  # fmt: skip
PLAIN_COLUMNS = ("tokens", "documents")


class FileEntry(BaseModel):
    """A file as recorded in the manifest."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rows: NonNegativeInt
    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class HookEntry(BaseModel):
    """A hook point: its width, and float64 sums over the eligible training tokens harvested so far."""

    model_config = ConfigDict(extra="forbid", strict=True)
    d_in: PositiveInt
    tokens: NonNegativeInt = 0
    sum: list[FiniteFloat] = []
    sum_of_squares: Annotated[FiniteFloat, Field(ge=0)] = 0.0


class Manifest(BaseModel):
    """Description of a cache. `model`, `data` and `tokens` decide whether it fits a request.

    With several sources, `data` also records `source_tokens`: the number of tokens by split and source. It also holds
    the counts of `sae.text.census.combined`, and the origin of the text. `stored` has the numbers of the shards with
    activations by split; None: all have them. The others' activations are computed when they are needed.
    """

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())
    format: str = FORMAT.name
    format_version: int = WHOLE_VERSION
    complete: bool = False
    model: dict[str, Any]
    data: dict[str, Any]
    tokens: dict[str, Any]
    context_length: PositiveInt
    shard_contexts: PositiveInt
    dtype: Literal["float32", "float16", "bfloat16", "int8"]
    rows: dict[str, NonNegativeInt]
    stored: dict[str, list[NonNegativeInt]] | None = None
    text_sha256: str
    hooks: dict[str, HookEntry]
    files: dict[str, FileEntry]

    def identity(self, hook: str) -> str:
        """Hash of everything that determines the activations at `hook` and which of them count."""
        model = {key: value for key, value in self.model.items() if key not in NOT_OF_ACTIVATIONS}
        facts = [
            model,
            self._deciding_data(),
            self.tokens,
            self.context_length,
            self.dtype,
            self.rows,
            self.text_sha256,
            hook,
        ]
        return fingerprint_of(facts if self.stored is None else [*facts, self.stored])

    def _deciding_data(self) -> dict[str, Any]:
        """`data` without entries that follow from the text, which has its own hash; all of it in older manifests."""
        if "token_columns" not in self.data:
            return self.data
        return {key: value for key, value in self.data.items() if key in ("holdout_fraction", "holdout_seed")}

    def is_whole(self, folder: Path, name: str) -> bool:
        """Whether a file exists with the size it was written with."""
        entry, path = self.files.get(name), folder / name
        return entry is not None and path.is_file() and path.stat().st_size == entry.bytes

    def shards(self, split: str) -> int:
        """Number of shards of a split."""
        return -(-self.rows[split] // (self.shard_contexts * self.context_length))

    def stored_shards(self, split: str) -> Sequence[int]:
        """Numbers of a split's shards with activations, ascending."""
        return range(self.shards(split)) if self.stored is None else self.stored[split]

    def stored_rows(self, split: str) -> int:
        """Tokens in a split whose activations are stored."""
        if self.stored is None:
            return self.rows[split]
        return sum(self.shard_rows(split, number) for number in self.stored[split])

    def shard_rows(self, split: str, number: int) -> int:
        """Tokens in a shard: the same in all but the last."""
        most = self.shard_contexts * self.context_length
        return min(most, self.rows[split] - number * most)

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written."""
        return self.model_dump(exclude={"stored"} if self.stored is None else None)

    def contradiction(self) -> str | None:
        """A part of the manifest that contradicts the rest; None if there is none."""
        return self._contradiction_of_parts() or (self._contradiction_of_files() if self.complete else None)

    def _contradiction_of_parts(self) -> str | None:
        missing = [split for split in SPLITS if split not in self.rows]
        if reason := f"rows: {missing[0]!r} is missing" if missing else self._contradiction_of_stored():
            return reason
        try:
            TokenPolicy.from_json(self.tokens)
        except (KeyError, TypeError, ValueError) as error:
            return f"tokens: {error}"
        columns = self.data.get("token_columns", PLAIN_COLUMNS)
        if not isinstance(columns, list | tuple) or not all(column in COLUMN_TYPES for column in columns):
            return f"data.token_columns: {columns!r}"
        for hook, entry in self.hooks.items():
            if entry.sum and len(entry.sum) != entry.d_in:
                return f"hooks.{hook}.sum: {len(entry.sum):,} numbers, but d_in is {entry.d_in:,}"
        for name in self.files:
            if name.startswith("/") or ".." in name.split("/"):
                return f"files: {name!r} leads out of the cache"
        return None

    def _contradiction_of_stored(self) -> str | None:
        for split in SPLITS:
            numbers = range(0) if self.stored is None else self.stored.get(split)
            if numbers is None or list(numbers) != sorted({n for n in numbers if n < self.shards(split)}):
                return f"stored.{split}: {numbers!r}"
        return None

    def _contradiction_of_files(self) -> str | None:
        stored = sum(len(self.stored_shards(split)) for split in SPLITS)
        count = 1 + sum(map(self.shards, SPLITS)) + stored * len(self.hooks)
        if len(self.files) != count:
            return f"files: {len(self.files):,} of them, but these rows and hook points need {count:,}"
        expected_rows: dict[str, int | None] = {DOCUMENTS: None} | {
            shard_name(part, split, number): self.shard_rows(split, number)
            for part in ("tokens", *self.hooks)
            for split in SPLITS
            for number in (range(self.shards(split)) if part == "tokens" else self.stored_shards(split))
        }
        for name, rows in expected_rows.items():
            if name not in self.files:
                return f"files: {name!r} is missing"
            if rows is not None and self.files[name].rows != rows:
                return f"files.{name}: {self.files[name].rows:,} rows instead of {rows:,}"
        return None


def shard_name(folder: str, split: str, number: int) -> str:
    """Path of a shard inside the cache; `folder` is `tokens` or a hook point."""
    return f"{folder}/{split}-{number:05d}.safetensors"


def find_cache(path: str | Path) -> Path:
    """The cache's folder, from its own path or that of a run folder.

    Raises:
        CacheError: there is no manifest in either.
    """
    folder = resolve(path, "activations", MANIFEST)
    if folder is None:
        raise CacheError(f"cache {str(path)!r}: no {MANIFEST} there; make one with 'sae harvest'")
    return folder


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CacheError: it is not a manifest of this format, or is of a newer version.
    """
    path = folder / MANIFEST
    record = read_object(path)
    FORMAT.check(record, f"cache {str(folder)!r}", MANIFEST, CacheError, oldest=1)
    manifest: Manifest = validated(path, Manifest, record)
    if reason := manifest.contradiction():
        raise damaged(path, f"damaged ({reason})")
    return manifest


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the cache.

    Raises:
        DamagedError: it leads out of the cache.
    """
    path = folder / name
    try:
        leads_out = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # such as a symbolic link to itself
        leads_out = True
    if leads_out:
        raise DamagedError(f"{str(path)!r}: leads out of the cache; put the file itself there, or {RESTORE}")
    return path


def shard_problem(folder: Path, name: str, entry: FileEntry) -> str | None:
    """The problem with a file of a cache; None if there is none."""
    try:
        check(inside(folder, name), entry.sha256, remedy=RESTORE)
    except CacheError as error:
        return str(error)
    return None
