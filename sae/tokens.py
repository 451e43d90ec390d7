"""Documents in, packed contexts of tokens out; and the one rule for which tokens count."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.config import DataConfig
from sae.corpus import SINGLE_TEXT_SUFFIXES, check_apart, is_held_out, read_documents
from sae.errors import DataError
from sae.mixture import Turns
from sae.seeding import STREAMS, document_random_1, python_random

TRAIN, HELD_OUT = "train", "held_out"
SPLITS: tuple[str, ...] = (TRAIN, HELD_OUT)
_CHARACTERS_AT_ONCE = 4_000_000
_SECTION_OF_SINGLE_FILE = 10_000


@dataclass(frozen=True)
class TokenPolicy:
    """Which tokens are part of training, statistics and evaluation: decided once, recorded, used everywhere.

    The first position and BOS have norms far above the rest in many models and would dominate every mean.

    Attributes:
        prepend_bos: every context begins with the BOS token.
        masked_positions: so many positions at the start of every context are left out.
        masked_ids: tokens of these ids are left out.
    """

    prepend_bos: bool
    masked_positions: int
    masked_ids: tuple[int, ...]

    def eligible(
        self, tokens: Int[Tensor, "context seq"] | None, positions: Int[Tensor, "context seq"] | None = None
    ) -> Bool[Tensor, "context seq"]:
        """True where a token counts.

        Args:
            tokens: ids; None if they are not known, as in a pass over embeddings: then only positions matter.
            positions: of each token in its text, and −1 for padding, which does not count; None: every context is a
                text from its beginning.
        """
        if positions is None:
            assert tokens is not None
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        eligible = positions >= max(self.masked_positions, 0)
        if tokens is not None:
            eligible = eligible & ~torch.isin(
                tokens, torch.tensor(self.masked_ids, dtype=tokens.dtype, device=tokens.device)
            )
        return eligible

    def to_json(self) -> dict[str, Any]:
        return {
            "prepend_bos": self.prepend_bos,
            "masked_positions": self.masked_positions,
            "masked_ids": list(self.masked_ids),
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> TokenPolicy:
        return TokenPolicy(record["prepend_bos"], record["masked_positions"], tuple(record["masked_ids"]))


@dataclass(frozen=True)
class PackedRows:
    """A run of consecutive rows of one split: tokens in text order, and the document each belongs to."""

    tokens: Int[np.ndarray, " rows"]
    documents: Int[np.ndarray, " rows"]


class Packer:
    """Packs one split's documents into contexts, and stops at an exact number of rows.

    A context opens with BOS (if `bos` is given) and goes on with documents, each followed by the separator. Row i
    belongs to context i // context_length; only the very last context may be shorter.
    """

    def __init__(self, rows: int, context_length: int, bos: int | None, separator: int | None) -> None:
        self.rows, self.context_length, self.bos, self.separator = rows, context_length, bos, separator
        self._numbers: dict[str, int] = {}
        self._packed = 0
        self._tokens: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._waiting = 0

    @property
    def names(self) -> list[str]:
        """Documents so far, in the order of their numbers."""
        return list(self._numbers)

    @property
    def full(self) -> bool:
        """Whether all rows asked for are packed or waiting to be."""
        return self._packed + self._rows_from(self._waiting) >= self.rows

    @property
    def available(self) -> int:
        """Rows that the documents so far amount to."""
        return min(self.rows, self._packed + self._rows_from(self._waiting))

    def add(self, name: str, ids: Sequence[int] | Int[np.ndarray, " tokens"]) -> int:
        """Append the tokens of a document, or of a section of one.

        Returns:
            How many rows these are, with the separator and the BOS of every context that they begin.
        """
        ends = [] if self.separator is None else [self.separator]
        tokens = np.concatenate([np.asarray(ids, dtype=np.int32), np.asarray(ends, dtype=np.int32)])
        document = self._numbers.setdefault(name, len(self._numbers))
        before = self._rows_from(self._waiting)
        self._tokens.append(tokens)
        self._documents.append(np.full(len(tokens), document, dtype=np.int32))
        self._waiting += len(tokens)
        return self._rows_from(self._waiting) - before

    def take(self, contexts: int) -> PackedRows | None:
        """The next `contexts` contexts, or the last ones when full; None until there are enough tokens."""
        rows = min(contexts * self.context_length, self.rows - self._packed)
        if rows == 0 or self._rows_from(self._waiting) < rows:
            return None
        begun = -(-rows // self.context_length) if self.bos is not None else 0
        tokens, documents = np.concatenate(self._tokens), np.concatenate(self._documents)
        text_rows = rows - begun
        self._tokens, self._documents = [tokens[text_rows:]], [documents[text_rows:]]
        self._waiting -= text_rows
        self._packed += rows
        starts = np.arange(begun) * (self.context_length - 1)
        of_starts = documents[starts]  # a last context of BOS alone belongs to the document that would follow
        tokens, documents = tokens[:text_rows], documents[:text_rows]
        return PackedRows(np.insert(tokens, starts, self.bos or 0), np.insert(documents, starts, of_starts))

    def _rows_from(self, text_tokens: int) -> int:
        """Rows that so many text tokens make, with a BOS row for every context begun."""
        if self.bos is None:
            return text_tokens
        return text_tokens + -(-text_tokens // (self.context_length - 1))


def packed_shards(
    config: DataConfig, tokenizer: Any, shard_contexts: int, packers: dict[str, Packer], streams: int = STREAMS
) -> Iterator[tuple[str, PackedRows]]:
    """Read, tokenise and pack the text of `config`; yields a split's name and a shard's rows, as soon as one is full.

    Several sources take turns, in each split on its own: see `sae.mixture.Turns`.

    Raises:
        DataError: the text cannot be read, a source lies inside another, or one ends before every split has the tokens
            asked for.
    """
    check_apart(config.sources)
    numbers = range(len(config.sources))
    readers = [_Reader(prepared_documents(config, number, streams), tokenizer, packers) for number in numbers]
    turns = {split: Turns(config.shares) for split in packers}
    while not all(packer.full for packer in packers.values()):
        for split, packer in packers.items():
            while not packer.full and (waiting := readers[turns[split].source].waiting[split]):
                turns[split].give(packer.add(*waiting.popleft()))
                while (rows := packer.take(shard_contexts)) is not None:
                    yield split, rows
        for split, packer in packers.items():
            reader = readers[turns[split].source]
            if not packer.full and not reader.waiting[split] and not reader.read():
                raise DataError(_too_little(config, split, packer, turns[split], reader.empty))


def prepared_documents(config: DataConfig, number: int = 0, streams: int = STREAMS) -> Iterator[tuple[str, str, str]]:
    """(document's name, text, split) of a source, cut into sections and shuffled as asked; nothing that is empty.

    Sections keep the name of their document, so they fall on one side of the held-out split and count as one document
    in standard errors. A single text file is the exception: there every section is a document of its own.

    Among several sources, names begin with the source's label. The held-out split goes by what they are without it, so
    that a document is on the same side alone and in every mix.
    """
    source = config.sources[number]
    documents = read_documents(
        source, split=config.split, subset=config.subset, column=config.column, streaming=config.streaming
    )
    path = Path(source).expanduser()
    alone = path.is_file() and path.suffix in SINGLE_TEXT_SUFFIXES
    characters = config.section_characters or (_SECTION_OF_SINGLE_FILE if alone else None)
    prefix = f"{config.labels[number]}/" if len(config.sources) > 1 else ""

    def prepared() -> Iterator[tuple[str, str, str]]:
        for document in documents:
            for section, text in enumerate(_sections(document.text, characters)):
                name = f"{document.name}#{section}" if alone else document.name
                if text.strip():
                    held_out = is_held_out(name, config.holdout_seed, config.holdout_fraction)
                    yield prefix + name, text, HELD_OUT if held_out else TRAIN

    if not config.shuffle_documents:
        return prepared()
    rng = document_random_1() if streams == 1 else python_random("order of documents", number)
    return _shuffled(prepared(), config.shuffle_documents, rng)


class _Reader:
    """One source, read ahead.

    Attributes:
        waiting: by split, name and tokens of the documents (or sections) whose turn has not come, in order.
        empty: whether no text has been found so far.
    """

    def __init__(self, documents: Iterator[tuple[str, str, str]], tokenizer: Any, packers: dict[str, Packer]) -> None:
        self._documents, self._tokenizer, self._packers = documents, tokenizer, packers
        self.waiting: dict[str, deque[tuple[str, np.ndarray]]] = {split: deque() for split in packers}
        self.empty = True

    def read(self) -> bool:
        """Tokenise some more documents, for the splits that are not full; False where the source has ended."""
        batch = list(_take_characters(self._documents))
        wanted = [(name, text, split) for name, text, split in batch if not self._packers[split].full]
        ids_of_all = _token_ids(self._tokenizer, [text for _, text, _ in wanted])
        for (name, _, split), ids in zip(wanted, ids_of_all, strict=True):
            self.waiting[split].append((name, np.array(ids, dtype=np.int32)))
        self.empty = self.empty and not batch
        return bool(batch)


def _sections(text: str, characters: int | None) -> Iterator[str]:
    if characters is None or len(text) <= characters:
        yield text
        return
    start = 0
    while start < len(text):
        newline = text.find("\n", start + characters)
        end = len(text) if newline < 0 or newline + 1 >= len(text) else newline + 1
        yield text[start:end]
        start = end


def _shuffled(
    items: Iterable[tuple[str, str, str]], buffer_size: int, rng: random.Random
) -> Iterator[tuple[str, str, str]]:
    """A streaming shuffle: each item leaves from a random place of the buffer."""
    items = iter(items)
    buffer = list(itertools.islice(items, buffer_size))
    for item in items:
        place = rng.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = item
    rng.shuffle(buffer)
    yield from buffer


def _take_characters(documents: Iterator[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
    count = 0
    for document in documents:
        yield document
        count += len(document[1])
        if count >= _CHARACTERS_AT_ONCE:
            return


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids without special tokens; fast tokenizers spread a batch over all cores."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _too_little(config: DataConfig, split: str, packer: Packer, turns: Turns, empty: bool) -> str:
    """Why a split is not full: the source whose turn it is has ended."""
    number, mixed = turns.source, len(config.sources) > 1
    given, share = turns.given[number], f"{turns.shares[number]:.3g} of " if mixed else ""
    setting = "data.tokens" if split == TRAIN else "data.held_out_tokens"
    found = (
        f"data source {config.sources[number]!r}: the {split.replace('_', '-')} documents hold {given:,} tokens, "
        f"{share}{setting}={packer.rows:,} were asked for"
    )
    if empty:
        return f"{found}: the text is empty"
    if given == 0:
        return (
            f"{found}; holdout_fraction={config.holdout_fraction} put no document there: change it or data.holdout_seed"
        )
    if mixed:
        possible = 0.995 * given / packer.rows  # never above what is there, once rounded to three digits
        return (
            f"{found}: lower its weight in data.weights (to a share of {possible:.3g}), or lower {setting} to "
            f"{packer.available:,}, or add text to this source"
        )
    return f"{found}: lower it, or add text"
