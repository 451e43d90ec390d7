"""Pieces of JSON text in; its records out, one at a time: a list's entries, objects in lines, or one object."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from sae.text.sections import joined

_SPACE = " \t\r\n"


class LongRecordError(Exception):
    """A record has more characters than are allowed."""


class Repeated(dict[str, Any]):
    """An object with repeated keys, each with its last value."""

    keys_twice: frozenset[str]


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its keys and values; `Repeated` if a key is repeated."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    repeated, counts = Repeated(record), Counter(key for key, _ in pairs)
    repeated.keys_twice = frozenset(key for key, count in counts.items() if count > 1)
    return repeated


def key_there_twice(record: dict[str, Any], key: str) -> str | None:
    """The key if the record repeats it, or else a key that a message in its value repeats; None if there is none."""
    if isinstance(record, Repeated) and key in record.keys_twice:
        return key
    value = record[key]
    waiting = [value] if isinstance(value, list) and value and isinstance(value[0], dict) else []
    while waiting:
        part = waiting.pop()
        if isinstance(part, Repeated):
            return min(part.keys_twice)
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return None


def json_records(
    pieces: Iterator[str], most: int = sys.maxsize,
    object_pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Iterator[Any]:  # fmt: skip
    """Records of a JSON text that is a list, one value, or several consecutive values.

    Only one record is held in memory, and the piece that it ends in.

    Args:
        pieces: the text.
        most: maximum characters of a record.
        object_pairs: makes an object from its keys and values; None makes a dict.

    Raises:
        LongRecordError: a record has more than `most` characters.
        ValueError: the text is not JSON.
    """
    text = _Buffer(pieces, most, object_pairs)
    if text.next_character() != "[":
        while text.next_character():
            yield text.value()
        return
    text.skip()
    while text.next_character() not in ("]", ""):
        yield text.value()
        separator = text.next_character()
        if separator == ",":
            text.skip()
            if text.next_character() == "]":
                raise ValueError("a comma before the end of the list")
        elif separator != "]":
            raise ValueError("expected ',' or ']' after an entry of the list")
    if not text.next_character():
        raise ValueError("the list does not end")
    text.skip()
    if text.next_character():
        raise ValueError("more after the end of the list")


class _Buffer:
    """Text that is read as it is needed, and dropped once it is parsed."""

    def __init__(self, pieces: Iterator[str], most: int, object_pairs: Callable[..., Any] | None) -> None:
        self._pieces, self._most, self._decoder = pieces, most, json.JSONDecoder(object_pairs_hook=object_pairs)
        self._text, self._place = "", 0

    def next_character(self) -> str:
        """The next character that is not space; "" at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _SPACE:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def skip(self) -> None:
        self._place += 1

    def value(self) -> Any:
        """The next value. While it seems incomplete, twice as much is read, so long values cost little more."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                available = len(self._text) - self._place
                if available > self._most:
                    raise LongRecordError from None
                if not self._more(min(available, self._most + 1 - available)):
                    raise
                continue
            if end - self._place > self._most:
                raise LongRecordError
            if end == len(self._text) and self._more():
                continue  # a number may continue in the next piece
            self._place = end
            return value

    def _more(self, characters: int = 1) -> bool:
        """Read at least this many more characters; False at the end."""
        new = joined(self._pieces, max(1, characters))
        self._text, self._place = self._text[self._place :] + new, 0
        return bool(new)
