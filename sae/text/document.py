"""A column's value in; text, token ids or a chat out, and an error for anything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int

from sae.errors import DataError

READING = 4
"""Version of how text is read.

0: equal documents were read every time. 1: documents had to be identical to count as equal, and a byte order mark was
part of a .txt or .md file's text. 2: lists of ids and chats had to be identical to count as equal, only .csv and .tsv
files were checked for lists written as text, and files that the toolkit wrote were read as text. 3: files full of NULs
were text, unreadable data after a stream of a .bz2 or .xz was ignored, the last of several keys or columns with the
same name was read, and a record could have any length. 4: see `sae.text.digests.ReadTexts`, `sae.text.written_lists`,
`sae.text.own_files`, `sae.text.binary` and `sae.text.limits`.
"""
_ROLES_OF_FROM = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Roles that have other names in the form {from, value}."""
_READ_BY_TEMPLATES = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking"}
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class LongText:
    """A text too long to hold in memory.

    Attributes:
        pieces: each call reads the text from its beginning.
        place: identifies the file: device and inode; None if unknown.
        beginning: its first characters.
    """

    pieces: Callable[[], Iterator[str]]
    place: tuple[int, int] | None
    beginning: str


@dataclass(frozen=True, eq=False)
class TokenIds:
    """A text that is already tokenised."""

    ids: Int[np.ndarray, " tokens"]


@dataclass(frozen=True)
class Chat:
    """A list of messages as a chat template takes them, with `role`, `content` and all other keys."""

    messages: tuple[dict[str, Any], ...]

    @property
    def characters(self) -> int:
        """Characters of all contents."""
        return sum(len(str(message.get("content", ""))) for message in self.messages)


Content = str | LongText | TokenIds | Chat


@dataclass(frozen=True)
class Document:
    """A content and its name, which decides on which side of the held-out split it falls."""

    name: str
    text: Content


def read_value(value: Any, column: str, where: str) -> Content:
    """Convert a cell to text, token ids or a chat; an empty cell gives "".

    Args:
        value: the cell, as the file's reader gives it.
        column: the column's name, for messages.
        where: the row, for messages.

    Raises:
        DataError: anything else.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # JSON may escape lone surrogates, which no tokenizer takes
    if value is None:
        return ""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if not value:
            return ""
        if set(map(type, value)) == {int}:
            return _token_ids(value, column, where)
        if all(isinstance(entry, Mapping) for entry in value):
            return _chat(value, column, where)
    raise DataError(
        f"data source {where}: column {column!r} holds {kind_of_value(value)}; expected text, a list of token ids, or "
        "a chat (a list of messages with role and content): choose another data.column, or convert it to one of these"
    )


def is_empty(content: Content) -> bool:
    """Whether a content has nothing to read."""
    if isinstance(content, str):
        return not content.strip()
    if isinstance(content, TokenIds):
        return not len(content.ids)
    return isinstance(content, Chat) and not content.messages


def essential(content: TokenIds | Chat) -> TokenIds | Chat:
    """A chat with only those keys of its messages that chat templates read; a list of ids unchanged."""
    if isinstance(content, TokenIds):
        return content
    return Chat(
        tuple({key: part for key, part in message.items() if key in _READ_BY_TEMPLATES} for message in content.messages)
    )


def digest_of(content: str | TokenIds | Chat) -> bytes:
    """A hash of a content, equal only for equal contents of the same kind."""
    if isinstance(content, str):
        kind, data = b"", content.encode()
    elif isinstance(content, TokenIds):
        kind, data = b"ids", content.ids.astype("<i4").tobytes()
    else:
        kind, data = b"chat", json.dumps(content.messages, sort_keys=True, default=str).encode()
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, person=kind).digest()


def digest_of_pieces(pieces: Iterable[str], *, stripped: bool = False) -> bytes:
    """`digest_of` for a text that comes in pieces; with `stripped`, without the space at its end."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    ended = digest.copy()
    for piece in pieces:
        words = piece.rstrip() if stripped else piece
        if words:
            digest.update(words.encode())
            ended = digest.copy()
        digest.update(piece[len(words) :].encode())
    return ended.digest()


def _token_ids(value: Sequence[int], column: str, where: str) -> TokenIds:
    if min(value) < 0 or max(value) >= 2**31:
        invalid = next(entry for entry in value if not 0 <= entry < 2**31)
        raise DataError(
            f"data source {where}: column {column!r} holds a list with {invalid}, which is not a token id; choose "
            "another data.column"
        )
    return TokenIds(np.array(value, dtype=np.int32))


def _chat(value: Sequence[Mapping[str, Any]], column: str, where: str) -> Chat:
    messages = []
    for number, entry in enumerate(value, 1):
        message = {key: part for key, part in entry.items() if part is not None}
        if "role" not in message and "from" in message:
            sender = message.pop("from")
            message["role"] = _ROLES_OF_FROM.get(sender, sender) if isinstance(sender, str) else sender
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
        content = _joined_parts(message.get("content"))
        if content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise DataError(
                f"data source {where}: column {column!r}, entry {number} of the list: expected a message with a role "
                f"and a content that is text, found {kind_of_value(entry)}; choose another data.column"
            )
        messages.append({**message, "content": content.encode("utf-8", "replace").decode()})
    return Chat(tuple(messages))


def _joined_parts(content: Any) -> Any:
    """The text of a content that is a list of text parts; any other content unchanged."""
    if not isinstance(content, list | tuple) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return (
        "".join(text for text in texts if text is not None) if all(isinstance(text, str) for text in texts) else content
    )


def kind_of_value(value: Any) -> str:
    """A description of a value: its kind, and an excerpt."""
    if isinstance(value, bool):
        return f"a truth value ({value})"
    if isinstance(value, int | float):
        return f"a number ({value!r})"[:60]
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value):,} bytes"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(repr(str(key)) for key in list(value)[:8]) or 'no keys'}"
    if isinstance(value, list | tuple):
        return f"a list of {_entries(value)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def _entries(value: Sequence[Any]) -> str:
    for kind, name in ((str, "text"), (bool, "truth values"), (Mapping, "objects"), (list | tuple, "lists")):
        if all(isinstance(entry, kind) for entry in value):
            return name
    if all(isinstance(entry, int | float) and not isinstance(entry, bool) for entry in value):
        return f"numbers ({value[0]!r}, …)"
    unlike = next((pair for pair in pairwise(value) if type(pair[0]) is not type(pair[1])), value[:1])
    return " and ".join("null" if entry is None else type(entry).__name__ for entry in unlike)
