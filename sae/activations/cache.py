"""The activation cache on disk: its manifest, opening it, reading it, verifying it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.errors import CacheError
from sae.tokens import TRAIN, TokenPolicy

FORMAT = "sae-activations"
FORMAT_VERSION = 1
MANIFEST, DOCUMENTS = "manifest.json", "documents.json"
_ROUNDING = 1e-12
"""Share of E‖x‖² up to which a variance can be the rounding of sums in float64."""


class FileEntry(BaseModel):
    """A shard as the manifest knows it."""

    model_config = ConfigDict(extra="forbid")
    rows: int
    bytes: int
    sha256: str


class HookEntry(BaseModel):
    """A hook point: its width, and sums over the eligible training tokens harvested so far, in float64."""

    model_config = ConfigDict(extra="forbid")
    d_in: int
    tokens: int = 0
    sum: list[float] = []
    sum_of_squares: float = 0.0


class Manifest(BaseModel):
    """Everything that says what a cache holds. `model`, `data` and `tokens` decide whether it fits a request.

    Of several sources, `data` also records `source_tokens`: by split and source, how many tokens came from it. What
    else was found in the text (see `sae.text.census.combined`) and where it came from stands there too.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    complete: bool = False
    model: dict[str, Any]
    data: dict[str, Any]
    tokens: dict[str, Any]
    context_length: int
    shard_contexts: int
    dtype: str
    rows: dict[str, int]
    text_sha256: str
    hooks: dict[str, HookEntry]
    files: dict[str, FileEntry]

    def identity(self, hook: str) -> str:
        """A hash of all that decides the activations at `hook` and which of them count: equal only for equal caches."""
        model = {key: value for key, value in self.model.items() if key not in ("name", "fingerprint")}
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
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _deciding_data(self) -> dict[str, Any]:
        """Without what follows from the text, whose hash is a fact of its own; all of it in older manifests."""
        if "token_columns" not in self.data:
            return self.data
        return {key: value for key, value in self.data.items() if key in ("holdout_fraction", "holdout_seed")}

    def is_whole(self, folder: Path, name: str) -> bool:
        """Whether a file is there and of the size it was written with."""
        entry, path = self.files.get(name), folder / name
        return entry is not None and path.is_file() and path.stat().st_size == entry.bytes


@dataclass(frozen=True)
class Statistics:
    """Over the eligible training tokens of one hook point.

    Attributes:
        tokens: how many they are.
        mean: E[x], in float64: the variance is a difference of squares, and with a large mean the smaller part of them.
        mean_squared_norm: E‖x‖².
        centred: E‖x − E x‖² as it was measured, where all rows were there at once; None: it follows from the others.
    """

    tokens: int
    mean: Float[Tensor, " d_in"]
    mean_squared_norm: float
    centred: float | None = None

    @staticmethod
    def of(rows: Float[Tensor, "rows d_in"]) -> Statistics:
        """Of rows in memory. Their variance is exact next to any mean, and 0 only if they are equal."""
        rows = rows.detach().double()
        variance = (rows - rows[0]).var(0, correction=0).sum()
        return Statistics(len(rows), rows.mean(0), float(rows.square().sum(1).mean()), float(variance))

    @property
    def variance(self) -> float:
        """E‖x − E x‖², summed over d_in; 0 if it is no more than the rounding of the two squares."""
        if self.centred is not None:
            return self.centred
        variance = self.mean_squared_norm - float(self.mean.double().square().sum())
        rounding = max(_ROUNDING, torch.finfo(self.mean.dtype).eps) * self.mean_squared_norm
        return 0.0 if variance <= rounding else variance


@dataclass(frozen=True)
class ContextBatch:
    """Consecutive contexts of a split. `first_row` + position in the flattened batch is a token's row.

    Attributes:
        tokens: ids.
        documents: index into `ActivationCache.documents(split)`.
        eligible: False for tokens masked out of training, statistics and evaluation.
        activations: as stored, converted to float32; None where no hook point was asked for.
        sections: the number of the section of its document, among all; None where documents were not cut.
    """

    first_row: int
    tokens: Int[Tensor, "context seq"]
    documents: Int[Tensor, "context seq"]
    eligible: Bool[Tensor, "context seq"]
    activations: Float[Tensor, "context seq d_in"] | None
    sections: Int[Tensor, "context seq"] | None = None

    def contexts(self, first: int, end: int) -> ContextBatch:
        """Those from `first` up to `end`, as a batch of their own."""
        part = slice(first, end)
        return ContextBatch(
            self.first_row + first * self.tokens.shape[1],
            self.tokens[part],
            self.documents[part],
            self.eligible[part],
            None if self.activations is None else self.activations[part],
            None if self.sections is None else self.sections[part],
        )


def shard_name(folder: str, split: str, number: int) -> str:
    """Path of a shard inside the cache; `folder` is `tokens` or a hook point."""
    return f"{folder}/{split}-{number:05d}.safetensors"


class ActivationCache:
    """A harvested cache, opened for reading; shards are mapped into memory, not read.

    Args:
        path: the cache's folder, or the run folder that holds it.

    Raises:
        CacheError: there is no complete cache, or a file's size is not the manifest's.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find_cache(path)
        self.manifest = read_manifest(self.path)
        if not self.manifest.complete:
            raise CacheError(
                f"cache {str(self.path)!r}: the harvest is unfinished; run the same 'sae harvest' to finish it"
            )
        for name, entry in self.manifest.files.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry.bytes:
                state = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
                raise CacheError(
                    f"cache {str(self.path)!r}: {name} {state}; delete it and run the same 'sae harvest' to restore it"
                )

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hook points in the cache."""
        return tuple(self.manifest.hooks)

    @property
    def policy(self) -> TokenPolicy:
        """Which tokens count."""
        return TokenPolicy.from_json(self.manifest.tokens)

    @property
    def context_length(self) -> int:
        """Tokens per context."""
        return self.manifest.context_length

    def rows(self, split: str = TRAIN) -> int:
        """Tokens in a split, masked ones included."""
        return self.manifest.rows[split]

    def source_tokens(self, split: str = TRAIN) -> dict[str, int]:
        """Tokens in a split by the label of the source they came from, where several were mixed; else empty."""
        return self.manifest.data.get("source_tokens", {}).get(split, {})

    def d_in(self, hook: str) -> int:
        """Width of the activations at `hook`."""
        return self._hook(hook).d_in

    def statistics(self, hook: str) -> Statistics:
        """Mean and mean squared norm of the training activations at `hook`.

        Raises:
            CacheError: the hook point is not in the cache, or every training token is masked.
        """
        entry = self._hook(hook)
        if entry.tokens == 0:
            raise CacheError(f"cache {str(self.path)!r}: every training token is masked, so there are no statistics")
        mean = torch.tensor(entry.sum, dtype=torch.float64) / entry.tokens
        return Statistics(entry.tokens, mean, entry.sum_of_squares / entry.tokens)

    def documents(self, split: str = TRAIN) -> list[str]:
        """Names of the split's documents, in order."""
        return json.loads((self.path / DOCUMENTS).read_text(encoding="utf-8"))[split]

    def shards(self, split: str = TRAIN) -> int:
        """Number of shards of a split."""
        return -(-self.rows(split) // (self.manifest.shard_contexts * self.context_length))

    def token_columns(self, split: str, number: int) -> dict[str, Tensor]:
        """What a shard says of each token, `[rows]` each: `tokens` and `documents`.

        And `sections` if documents were cut, and `counted` if only some roles of chats count.
        """
        file = self._open(shard_name("tokens", split, number))
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping

    def token_shard(self, split: str, number: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Tokens and document indices of a shard, int32."""
        file = self._open(shard_name("tokens", split, number))
        return file.get_tensor("tokens"), file.get_tensor("documents")

    def eligible_shard(self, split: str, number: int) -> Bool[Tensor, " rows"]:
        """Which rows of a shard count."""
        columns = self.token_columns(split, number)
        return eligible_rows(columns["tokens"], self.policy, self.context_length, columns.get("counted"))

    def activation_shard(self, hook: str, split: str, number: int) -> tuple[Tensor, Float[Tensor, " rows"] | None]:
        """Activations `[rows, d_in]` of a shard as stored, mapped into memory; and the scale per row for int8."""
        self._hook(hook)
        file = self._open(shard_name(hook, split, number))
        scale = file.get_tensor("scale") if self.manifest.dtype == "int8" else None
        return file.get_tensor("activations"), scale

    def contexts(
        self, split: str = TRAIN, hook: str | None = None, *, batch_contexts: int = 64, max_tokens: int | None = None
    ) -> Iterator[ContextBatch]:
        """A split in text order, a few contexts at a time; `max_tokens` stops before the context that would exceed it.

        A last context that is shorter than the others comes alone.
        """
        length, left = self.context_length, self.rows(split) if max_tokens is None else max_tokens
        first_row = 0
        for number in range(self.shards(split)):
            columns = self.token_columns(split, number)
            tokens, documents, sections = columns["tokens"], columns["documents"], columns.get("sections")
            eligible = eligible_rows(tokens, self.policy, length, columns.get("counted"))
            activations, scale = self.activation_shard(hook, split, number) if hook else (None, None)
            for start, whole_stop in _batch_ranges(len(tokens), length, batch_contexts):
                cut_short = left < whole_stop - start
                stop = start + left // length * length if cut_short else whole_stop
                if stop <= start:
                    return
                seq = min(length, stop - start)
                x = None
                if activations is not None:
                    x = dequantise(activations[start:stop], None if scale is None else scale[start:stop])
                    x = x.view(-1, seq, x.shape[-1])
                yield ContextBatch(
                    first_row + start,
                    tokens[start:stop].view(-1, seq).long(),
                    documents[start:stop].view(-1, seq).long(),
                    eligible[start:stop].view(-1, seq),
                    x,
                    None if sections is None else sections[start:stop].view(-1, seq).long(),
                )
                if cut_short:
                    return
                left -= stop - start
            first_row += len(tokens)

    def _hook(self, hook: str) -> HookEntry:
        if hook not in self.manifest.hooks:
            raise CacheError(f"cache {str(self.path)!r}: hook {hook!r} is not in it; it holds {', '.join(self.hooks)}")
        return self.manifest.hooks[hook]

    @functools.lru_cache(maxsize=256)  # noqa: B019  a cache is opened once a run
    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.path / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CacheError(
                f"cache {str(self.path)!r}: {name} is damaged ({error}); delete it and run the same 'sae harvest' to "
                "restore it"
            ) from error

    def __repr__(self) -> str:
        rows = ", ".join(f"{count:,} {split}{self._origin(split)}" for split, count in self.manifest.rows.items())
        return f"ActivationCache({str(self.path)!r}: {rows} tokens, {', '.join(self.hooks)}, {self.manifest.dtype})"

    def _origin(self, split: str) -> str:
        given = " + ".join(f"{count:,} of {label}" for label, count in self.source_tokens(split).items())
        return f" ({given})" if given else ""


def eligible_rows(
    tokens: Int[Tensor, " rows"], policy: TokenPolicy, context_length: int, counted: Bool[Tensor, " rows"] | None = None
) -> Bool[Tensor, " rows"]:
    """Which rows count, for rows that begin at a context's start and may end inside one.

    Args:
        tokens: ids.
        policy: decides by ids and positions.
        context_length: tokens of a context.
        counted: False for tokens of a chat's roles that do not count; None: there are none.
    """
    whole = len(tokens) // context_length * context_length
    parts = [tokens[:whole].view(-1, context_length)]
    if whole < len(tokens):
        parts.append(tokens[whole:].view(1, -1))
    eligible = torch.cat([policy.eligible(part).flatten() for part in parts])
    return eligible if counted is None else eligible & counted


def dequantise(activations: Tensor, scale: Tensor | None) -> Float[Tensor, "rows d_in"]:
    """Stored activations as float32."""
    return activations.float() if scale is None else activations.float() * scale[:, None]


def verify(path: str | Path) -> tuple[int, list[str]]:
    """Compare every file of a cache with its checksum.

    Returns:
        How many files were read, and a line for each that is missing or differs.
    """
    folder = find_cache(path)
    manifest = read_manifest(folder)
    with ThreadPoolExecutor() as pool:
        problems = pool.map(lambda item: _check(folder, *item), manifest.files.items())
        return len(manifest.files), [problem for problem in problems if problem]


def find_cache(path: str | Path) -> Path:
    """The cache's folder, given that or a run folder.

    Raises:
        CacheError: neither holds a manifest.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / "activations"):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise CacheError(f"cache {str(path)!r}: no {MANIFEST} there; make one with 'sae harvest'")


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        CacheError: not a manifest of this format, or of a newer version.
    """
    damaged = f"cache {str(folder)!r}: {MANIFEST} is damaged"
    try:
        record = json.loads((folder / MANIFEST).read_bytes())
        written_as = (record["format"], record["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{damaged} ({error}); delete the cache and harvest it anew") from error
    if written_as[0] != FORMAT or written_as[1] > FORMAT_VERSION:
        raise CacheError(
            f"cache {str(folder)!r}: format {written_as[0]!r} version {written_as[1]}; this package reads "
            f"{FORMAT!r} up to version {FORMAT_VERSION}"
        )
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        reason = f"{where}: {error.errors()[0]['msg']}"
        raise CacheError(f"{damaged} ({reason}); delete the cache and harvest it anew") from error


def _batch_ranges(rows: int, length: int, batch_contexts: int) -> Iterator[tuple[int, int]]:
    whole = rows // length * length
    for start in range(0, whole, batch_contexts * length):
        yield start, min(start + batch_contexts * length, whole)
    if whole < rows:
        yield whole, rows


def _check(folder: Path, name: str, entry: FileEntry) -> str | None:
    file = folder / name
    if not file.is_file():
        return f"{name}: missing"
    if file.stat().st_size != entry.bytes:
        return f"{name}: {file.stat().st_size:,} bytes instead of {entry.bytes:,}"
    with file.open("rb") as content:
        digest = hashlib.sha256()
        while chunk := content.read(1 << 24):
            digest.update(chunk)
    return (
        None
        if digest.hexdigest() == entry.sha256
        else f"{name}: checksum differs; the file was changed after the harvest"
    )
