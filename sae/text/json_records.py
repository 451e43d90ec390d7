"""JSON text in pieces in; its records out, one at a time: a list's entries, objects in lines, or one object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

_SPACE = " \t\r\n"


def json_records(pieces: Iterator[str]) -> Iterator[Any]:
    """Records of a JSON text that is a list, one value, or several values after one another.

    Only one record is held in memory, and the piece that it ends in.

    Raises:
        ValueError: the text is not JSON.
    """
    text = _Buffer(pieces)
    first = text.next_character()
    in_list = first == "["
    if in_list:
        text.skip()
    while (character := text.next_character()) and not (in_list and character == "]"):
        yield text.value()
        if in_list and text.next_character() == ",":
            text.skip()
            if text.next_character() == "]":
                raise ValueError("a comma before the end of the list")
        elif in_list and text.next_character() != "]":
            raise ValueError("expected ',' or ']' after an entry of the list")
    if in_list:
        if not text.next_character():
            raise ValueError("the list does not end")
        text.skip()
        if text.next_character():
            raise ValueError("more after the end of the list")


class _Buffer:
    """Text that is read as far as it is needed, and dropped as it is parsed."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces, self._decoder = pieces, json.JSONDecoder()
        self._text, self._place, self._ended = "", 0, False

    def next_character(self) -> str:
        """The next that is not space, or nothing at the end."""
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
        """The next value. While it seems unfinished twice as much is read, so long values cost little more."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError:
                if not self._more(len(self._text) - self._place):
                    raise
                continue
            if end == len(self._text) and self._more():
                continue  # a number may go on in the next piece
            self._place = end
            return value

    def _more(self, characters: int = 1) -> bool:
        """Read at least so many more characters; False at the end."""
        new, length = [], 0
        while not self._ended and length < max(1, characters):
            piece = next(self._pieces, None)
            if piece is None:
                self._ended = True
            else:
                new.append(piece)
                length += len(piece)
        self._text, self._place = self._text[self._place :] + "".join(new), 0
        return length > 0
