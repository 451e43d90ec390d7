"""Documents in; packed contexts of tokens out, with the tokens that count."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sae.config.mixture import Turns
from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.errors import DataError
from sae.numerics.seeding import STREAMS
from sae.text.census import Census
from sae.text.corpus import check_apart, check_revision, holdout_share
from sae.text.digests import ReadTexts
from sae.text.document import READING, Chat, Content, TokenIds
from sae.text.prepared import prepared_documents, take_characters
from sae.text.recorded import check_recorded_tokenizer
from sae.text.tokenise import ContentTokenizer, TokenPart


@dataclass(frozen=True)
class PackedRows:
    """A run of consecutive rows of one split, in text order.

    Attributes:
        tokens: token ids.
        documents: number of each token's document.
        sections: number of each token's section, counted over all documents.
        counted: False for tokens of a chat's roles that do not count.
    """

    tokens: Int[np.ndarray, " rows"]
    documents: Int[np.ndarray, " rows"]
    sections: Int[np.ndarray, " rows"]
    counted: Bool[np.ndarray, " rows"]


class Packer:
    """Packs one split's documents into contexts, and stops at an exact number of rows.

    A context begins with BOS (if `bos` is given), followed by documents, each of which ends with the separator. Row i
    belongs to context i // context_length; only the very last context may be shorter.
    """

    def __init__(self, rows: int, context_length: int, bos: int | None, separator: int | None) -> None:
        self.rows, self.context_length, self.bos, self.separator = rows, context_length, bos, separator
        self._numbers: dict[str, int] = {}
        self._packed = self._sections = self._waiting = 0
        self._parts: list[PackedRows] = []

    @property
    def names(self) -> list[str]:
        """Names of the documents so far, in the order of their numbers."""
        return list(self._numbers)

    @property
    def full(self) -> bool:
        """Whether all requested rows are packed or waiting to be."""
        return self._packed + self._rows_from(self._waiting) >= self.rows

    @property
    def available(self) -> int:
        """Rows that the documents so far amount to."""
        return min(self.rows, self._packed + self._rows_from(self._waiting))

    def add(
        self, name: str, ids: Sequence[int] | Int[np.ndarray, " tokens"],
        counted: Bool[np.ndarray, " tokens"] | None = None, *, ends: bool = True,
    ) -> int:  # fmt: skip
        """Append the tokens of a document, or of a section of one.

        Args:
            name: the document's name.
            ids: its tokens.
            counted: which of them count; None means all.
            ends: whether the document (or section) ends with these tokens, so that the separator follows.

        Returns:
            Number of rows, including the separator and the BOS of every context that they begin.
        """
        separators = [self.separator] if ends and self.separator is not None else []
        tokens = np.concatenate([np.asarray(ids, dtype=np.int32), np.asarray(separators, dtype=np.int32)])
        uncounted = np.zeros(len(separators), dtype=bool)
        counts = np.ones(len(tokens), dtype=bool) if counted is None else np.append(counted, uncounted)
        document = self._numbers.setdefault(name, len(self._numbers))
        before = self._rows_from(self._waiting)
        self._parts.append(
            PackedRows(
                tokens=tokens,
                documents=np.full(len(tokens), document, dtype=np.int32),
                sections=np.full(len(tokens), self._sections, dtype=np.int32),
                counted=counts,
            )
        )
        self._sections += ends
        self._waiting += len(tokens)
        return self._rows_from(self._waiting) - before

    def take(self, contexts: int) -> PackedRows | None:
        """The next `contexts` contexts, or fewer at the end; None until there are enough tokens."""
        rows = min(contexts * self.context_length, self.rows - self._packed)
        if rows == 0 or self._rows_from(self._waiting) < rows:
            return None
        bos_rows = -(-rows // self.context_length) if self.bos is not None else 0
        names = [column.name for column in fields(PackedRows)]
        columns = {name: np.concatenate([getattr(part, name) for part in self._parts]) for name in names}
        text_rows = rows - bos_rows
        self._parts = [PackedRows(**{name: column[text_rows:] for name, column in columns.items()})]
        self._waiting -= text_rows
        self._packed += rows
        starts = np.arange(bos_rows) * (self.context_length - 1)
        # A BOS belongs to the document after it, even if the last context has only its BOS left.
        inserted = {name: column[starts] for name, column in columns.items()} | {
            "tokens": np.full(bos_rows, self.bos or 0)
        }
        return PackedRows(
            **{name: np.insert(column[:text_rows], starts, inserted[name]) for name, column in columns.items()}
        )

    def _rows_from(self, text_tokens: int) -> int:
        """Number of rows for a number of text tokens, with a BOS row for every context begun."""
        if self.bos is None:
            return text_tokens
        return text_tokens + -(-text_tokens // (self.context_length - 1))


def packed_shards(
    config: DataConfig, tokenizer: Any, shard_contexts: int, packers: dict[str, Packer], streams: int = STREAMS,
    census: Sequence[Census] | None = None, reading: int = READING, model_rows: int | None = None,
) -> Iterator[tuple[str, PackedRows]]:  # fmt: skip
    """Read, tokenise and pack the text of `config`; yield the split's name and the rows of each shard once it is full.

    Several sources take turns, separately in each split: see `sae.config.mixture.Turns`.

    Args:
        config: settings of the text.
        tokenizer: the model's.
        shard_contexts: contexts per shard.
        packers: one for each split; each knows its number of rows.
        streams: version of the random streams that shuffle documents.
        census: one for each source, which counts its skipped and special entries.
        reading: version of how text is read.
        model_rows: number of tokens with an embedding in the model; None means all that the tokenizer names.

    Raises:
        DataError: the text cannot be read, a source lies inside another, a source ends before every split has its
            tokens, or a token has no embedding.
    """
    check_apart(config.sources)
    check_revision(config.sources, config.revision)
    census = census or [Census() for _ in config.sources]
    separator = next(iter(packers.values())).separator
    contents = ContentTokenizer(tokenizer, config.chat_roles, separator, model_rows)
    read = ReadTexts(contents.compared, reading)
    readers = [
        _Reader(
            config.sources[number],
            prepared_documents(config, number, streams, counts, read, reading),
            contents,
            packers,
            config,
            counts,
        )
        for number, counts in enumerate(census)
    ]
    turns = {split: Turns(config.shares) for split in packers}
    try:
        while not all(packer.full for packer in packers.values()):
            for split, packer in packers.items():
                while not packer.full and (waiting := readers[turns[split].source].waiting[split]):
                    added = 0
                    for name, part, ends in _marked_ends(*waiting.popleft()):
                        added += packer.add(name, part.ids, part.counted, ends=ends)
                        while (rows := packer.take(shard_contexts)) is not None:
                            yield split, rows
                        if packer.full:
                            break
                    turns[split].give(added)
            for split, packer in packers.items():
                reader = readers[turns[split].source]
                if not packer.full and not reader.waiting[split] and not reader.read():
                    raise DataError(_too_little(config, split, packer, turns[split], reader))
    finally:
        contents.close()


class _Reader:
    """One source, read ahead.

    Args:
        source: its name.
        documents: its documents, from `prepared_documents`.
        contents: converts them to tokens.
        packers: by split; full ones need no more documents.
        config: settings of the text.
        census: counts of skipped and special entries.

    Attributes:
        waiting: by split, name and tokens of the documents (or sections) whose turn has not come, in order.
        read_so_far: number of documents (or sections).
        least, largest: their least and largest position between 0 and 1; those below `holdout_fraction` are held out.
    """

    def __init__(
        self, source: str, documents: Iterator[tuple[str, Content, str]], contents: ContentTokenizer,
        packers: dict[str, Packer], config: DataConfig, census: Census,
    ) -> None:  # fmt: skip
        self.source, self.census = source, census
        self.waiting: dict[str, deque[tuple[str, Iterator[TokenPart]]]] = {split: deque() for split in packers}
        self.read_so_far, self.least, self.largest = 0, 1.0, 0.0
        self._documents, self._contents, self._packers, self._config = documents, contents, packers, config
        self._last, self._compared = "", False

    def read(self) -> bool:
        """Tokenise some more documents for the splits that are not full; False if the source has ended."""
        batch = list(take_characters(self._documents))
        for name, _, _ in batch:
            self._count(name)
        needed = [(name, content, split) for name, content, split in batch if not self._packers[split].full]
        if not self._compared and any(isinstance(content, TokenIds) for _, content, _ in needed):
            check_recorded_tokenizer(self.source, self._contents.tokenizer, self._config.tokenizer)
            self._compared = True
        chats = (content for _, content, _ in needed if isinstance(content, Chat))
        self.census.roles.update(message["role"] for chat in chats for message in chat.messages)
        tokens = self._contents([(name, content) for name, content, _ in needed])
        for (name, _, split), parts in zip(needed, tokens, strict=True):
            self.waiting[split].append((name, parts))
        return bool(batch)

    def _count(self, name: str) -> None:
        """Count a document; consecutive sections with the same name count once."""
        if name != self._last:
            plain = name.partition("/")[2] if len(self._config.sources) > 1 else name
            share = holdout_share(plain, self._config.holdout_seed)
            self.least, self.largest = min(self.least, share), max(self.largest, share)
            self.read_so_far += 1
            self._last = name


def _marked_ends(name: str, parts: Iterator[TokenPart]) -> Iterator[tuple[str, TokenPart, bool]]:
    """The parts of a document, each with a flag that marks the last."""
    end = TokenPart(np.empty(0, dtype=np.int32))
    for part, following in itertools.pairwise(itertools.chain(parts, [end])):
        yield name, part, following is end


def _too_little(config: DataConfig, split: str, packer: Packer, turns: Turns, reader: _Reader) -> str:
    """The message for a split that is not full because the source whose turn it is has ended."""
    number, mixed = turns.source, len(config.sources) > 1
    given, share = turns.given[number], f"{turns.shares[number]:.3g} of " if mixed else ""
    setting = "data.tokens" if split == TRAIN else "data.held_out_tokens"
    problem = (
        f"data source {config.sources[number]!r}: the {split.replace('_', '-')} documents hold {given:,} tokens, "
        f"{share}{setting}={packer.rows:,} were asked for"
    )
    if not reader.read_so_far and reader.census.duplicates:
        return (
            f"{problem}: its {reader.census.duplicates:,} documents equal those of another source, and equal ones are "
            "read once: take it out of data.source, or give it other text"
        )
    if not reader.read_so_far:
        return f"{problem}: the text is empty"
    if reader.read_so_far == 1:
        cut = "" if config.holdout_by == "document" else "lower data.section_characters to cut it into more, or "
        return (
            f"{problem}: all of it is one document of one section, and a held-out split needs at least two: {cut}add "
            "text"
        )
    if given == 0:
        held_out = split == HELD_OUT
        bound = math.ceil(reader.least * 1e4 + 1) / 1e4 if held_out else math.floor(reader.largest * 1e4) / 1e4
        return (
            f"{problem}; holdout_fraction={config.holdout_fraction} put no document there: change it or "
            f"data.holdout_seed ({bound:g} would put one there)"
        )
    if mixed:
        possible = 0.995 * given / packer.rows  # never above the available share, once rounded to three digits
        return (
            f"{problem}: lower its weight in data.weights (to a share of {possible:.3g}), or lower {setting} to "
            f"{packer.available:,}, or add text to this source"
        )
    return f"{problem}: lower it, or add text"
