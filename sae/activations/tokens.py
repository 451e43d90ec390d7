"""The tokens of a cache on disk: their documents, and which of them count. No activations are read."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.activations.background import background
from sae.activations.manifest import (
    COLUMN_TYPES,
    DOCUMENTS,
    MANIFEST,
    PLAIN_COLUMNS,
    RESTORE,
    find_cache,
    inside,
    read_manifest,
    shard_name,
)
from sae.config.splits import TRAIN
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import CacheError
from sae.files.damage import damaged
from sae.files.digest import Identity, identity_of
from sae.files.hashes import check
from sae.files.reading import open_tensors, read_json, tensor_of, validated
from sae.numerics.modes import in_own_modes

_SHARDS_AHEAD = 4
_MOST_MAPPED = 256
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True)
class ContextBatch:
    """Consecutive contexts of a split. `first_row` + position in the flattened batch is a token's row.

    Attributes:
        tokens: ids.
        documents: index into `ActivationCache.documents(split)`.
        eligible: False for tokens masked out of training, statistics and evaluation.
        activations: the stored activations as float32; None if no hook point was requested.
        sections: index of each token's section, counted over all documents; None if documents were not cut.
    """

    first_row: int
    tokens: Int[Tensor, "context seq"]
    documents: Int[Tensor, "context seq"]
    eligible: Bool[Tensor, "context seq"]
    activations: Float[Tensor, "context seq d_in"] | None
    sections: Int[Tensor, "context seq"] | None = None

    def contexts(self, first: int, end: int) -> ContextBatch:
        """Contexts `first` up to `end`, as a batch of their own."""
        part = slice(first, end)
        return ContextBatch(
            self.first_row + first * self.tokens.shape[1],
            self.tokens[part],
            self.documents[part],
            self.eligible[part],
            None if self.activations is None else self.activations[part],
            None if self.sections is None else self.sections[part],
        )


class TokenStore:
    """Tokens in text order, opened for reading; shards are mapped into memory, not read.

    Every file is compared with its hash before its first use in a process.

    Args:
        path: the store's folder, or the run folder that holds it.

    Raises:
        CacheError: there is no complete store, or a file's size differs from the manifest.
        DamagedError: (a CacheError) the manifest is damaged; when reading, a shard is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = find_cache(path)
        self.manifest = read_manifest(self.path)
        if not self.manifest.complete:
            raise CacheError(
                f"cache {str(self.path)!r}: the harvest is unfinished; run the same 'sae harvest' to finish it"
            )
        self._mapped: dict[str, tuple[Identity, Any]] = {}
        self._mapping = threading.Lock()
        for name, entry in self.manifest.files.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry.bytes:
                state = "is missing" if size is None else f"has {size:,} bytes instead of {entry.bytes:,}"
                raise CacheError(f"cache {str(self.path)!r}: {name} {state}; {RESTORE}")

    @property
    def policy(self) -> TokenPolicy:
        """Rules for which tokens count."""
        return TokenPolicy.from_json(self.manifest.tokens)

    @property
    def context_length(self) -> int:
        """Tokens per context."""
        return self.manifest.context_length

    def rows(self, split: str = TRAIN) -> int:
        """Tokens in a split, including masked ones."""
        return self.manifest.rows[split]

    def source_tokens(self, split: str = TRAIN) -> dict[str, int]:
        """Tokens in a split by the label of their source, if several sources were mixed; else empty."""
        return self.manifest.data.get("source_tokens", {}).get(split, {})

    def documents(self, split: str = TRAIN) -> list[str]:
        """Names of the split's documents, in order.

        Raises:
            DamagedError: the list of names is damaged.
        """
        path = self.path / DOCUMENTS
        names = read_json(path, self.manifest.files[DOCUMENTS].sha256, remedy=RESTORE)
        return validated(path, dict[str, list[str]], names, RESTORE)[split]

    def shards(self, split: str = TRAIN) -> int:
        """Number of shards of a split."""
        return len(self._numbers(split))

    def token_columns(self, split: str, number: int) -> dict[str, Tensor]:
        """The columns of a token shard, `[rows]` each: `tokens` and `documents`.

        Also `sections` if documents were cut, and `counted` if only some roles of chats count.
        """
        name, rows = self._name("tokens", split, number), (self._shard_rows(split, number),)
        return {column: self._tensor(name, column, COLUMN_TYPES[column], rows) for column in self._columns()}

    def token_shard(self, split: str, number: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Tokens and document indices of a shard, int32."""
        columns = self.token_columns(split, number)
        return columns["tokens"], columns["documents"]

    def eligible_shard(self, split: str, number: int) -> Bool[Tensor, " rows"]:
        """Which rows of a shard count."""
        columns = self.token_columns(split, number)
        return eligible_rows(columns["tokens"], self.policy, self.context_length, columns.get("counted"))

    @contextlib.contextmanager
    def checking(self, folder: str, split: str) -> Iterator[Callable[[int], Future[Identity]]]:
        """Compare shards with their hashes in threads, ahead of their use; pending checks are cancelled at the end.

        Args:
            folder: `tokens` or a hook point.
            split: split of the shards.

        Yields:
            A function that starts the check of a shard, given its number.
        """
        with background(THREADS) as pool:
            yield lambda number: pool.submit(self._check, self._name(folder, split, number))

    @in_own_modes
    def contexts(
        self, split: str = TRAIN, *, batch_contexts: int = 64, max_tokens: int | None = None
    ) -> Iterator[ContextBatch]:
        """A split in text order, a few contexts at a time, without the contexts that would exceed `max_tokens`.

        If the last context is shorter than the others, it forms a batch of its own.
        """
        yield from self._contexts(split, None, batch_contexts, max_tokens)

    def _contexts(
        self, split: str, hook: str | None, batch_contexts: int, max_tokens: int | None
    ) -> Iterator[ContextBatch]:
        length, left = self.context_length, self.rows(split) if max_tokens is None else max_tokens
        first_row = 0
        needed = range(min(self.shards(split), -(-left // (self.manifest.shard_contexts * length))))
        for number in self._checked(needed, hook or "tokens", split):
            columns = self.token_columns(split, number)
            tokens, documents, sections = columns["tokens"], columns["documents"], columns.get("sections")
            eligible = eligible_rows(tokens, self.policy, length, columns.get("counted"))
            activations = self._activations(hook, split, number)
            for start, batch_stop in _batch_ranges(len(tokens), length, batch_contexts):
                cut_short = left < batch_stop - start
                stop = start + left // length * length if cut_short else batch_stop
                if stop <= start:
                    return
                seq = min(length, stop - start)
                x = activations(slice(start, stop))
                yield ContextBatch(
                    first_row + start,
                    tokens[start:stop].view(-1, seq).long(),
                    documents[start:stop].view(-1, seq).long(),
                    eligible[start:stop].view(-1, seq),
                    None if x is None else x.view(-1, seq, x.shape[-1]),
                    None if sections is None else sections[start:stop].view(-1, seq).long(),
                )
                if cut_short:
                    return
                left -= stop - start
            first_row += len(tokens)

    def _activations(self, hook: str | None, split: str, number: int) -> Callable[[slice], Tensor | None]:
        """Returns rows of a shard's activations, if a hook point is given."""
        return lambda _: None

    def _checked(self, numbers: Sequence[int], folder: str, split: str) -> Iterator[int]:
        """Shard numbers, each once it is checked, while the next few are checked in the background."""
        with self.checking(folder, split) as begin:
            checks: deque[Future[Identity]] = deque()
            for index, number in enumerate(numbers):
                while len(checks) <= _SHARDS_AHEAD and index + len(checks) < len(numbers):
                    checks.append(begin(numbers[index + len(checks)]))
                checks.popleft().result()
                yield number

    def _numbers(self, split: str) -> Sequence[int]:
        """Numbers of the split's shards in their files' names."""
        return range(self.manifest.shards(split))

    def _name(self, folder: str, split: str, number: int) -> str:
        return shard_name(folder, split, self._numbers(split)[number])

    def _shard_rows(self, split: str, number: int) -> int:
        return self.manifest.shard_rows(split, self._numbers(split)[number])

    def _columns(self) -> Sequence[str]:
        return self.manifest.data.get("token_columns", PLAIN_COLUMNS)

    def _check(self, name: str) -> Identity:
        path = inside(self.path, name)
        return check(path, self.manifest.files[name].sha256, remedy=RESTORE)

    def _open(self, name: str) -> Any:
        """A mapped file, checked again if it has been written to since."""
        identity = self._check(name)
        with self._mapping:
            if name not in self._mapped or self._mapped[name][0] != identity:
                if len(self._mapped) >= _MOST_MAPPED:
                    self._mapped.pop(next(iter(self._mapped)))
                file = open_tensors(self.path / name, self.manifest.files[name].sha256, remedy=RESTORE)
                self._mapped[name] = identity_of((self.path / name).stat()), file
            return self._mapped[name][1]

    def _tensor(self, name: str, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor of a file, if it agrees with the manifest."""
        path = self.path / name
        tensor = tensor_of(self._open(name), key, path, RESTORE)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            actual, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
            raise damaged(path, f"{key} is {actual}, but {MANIFEST} says {expected}", RESTORE)
        return tensor

    def _origin(self, split: str) -> str:
        sources = " + ".join(f"{count:,} of {label}" for label, count in self.source_tokens(split).items())
        return f" ({sources})" if sources else ""


def eligible_rows(
    tokens: Int[Tensor, " rows"], policy: TokenPolicy, context_length: int, counted: Bool[Tensor, " rows"] | None = None
) -> Bool[Tensor, " rows"]:
    """Which rows count. Rows begin at the start of a context and may end inside one.

    Args:
        tokens: ids.
        policy: token policy, by ids and positions.
        context_length: tokens per context.
        counted: False for tokens of chat roles that do not count; None if there are none.
    """
    full = len(tokens) // context_length * context_length
    parts = [tokens[:full].view(-1, context_length)]
    if full < len(tokens):
        parts.append(tokens[full:].view(1, -1))
    eligible = torch.cat([policy.eligible(part).flatten() for part in parts])
    return eligible if counted is None else eligible & counted


def _batch_ranges(rows: int, length: int, batch_contexts: int) -> Iterator[tuple[int, int]]:
    full = rows // length * length
    for start in range(0, full, batch_contexts * length):
        yield start, min(start + batch_contexts * length, full)
    if full < rows:
        yield full, rows
