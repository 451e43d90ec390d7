"""Texts of a column in; an error if they are lists that a program wrote as text.

A CSV file has no lists. pandas writes a column of them as Python or NumPy prints them; other programs write JSON or the
`repr` of a tensor. Read as text, these would be numbers and quotation marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sae.errors import DataError
from sae.text.document import READING, Document

CELLS = 16
"""Number of cells with text, in a file or a hub data set, that decide for all."""

_NAMES = r"tensor|array|asarray|ndarray|list|tuple|set|frozenset|deque|Tensor|Array|DeviceArray|Series|Index|Int64Index"
_OPENING = re.compile(rf"[\[({{]|(?:\w+\.)*(?:{_NAMES})\(|<tf\.Tensor:")
_CLOSING = {"[": "]", "(": ")", "{": "}", "<": ">"}
_ITEM = re.compile(
    r"""
    (?:
    (?P<text> [bBuU]? (?: '[^'\\]*(?:\\.[^'\\]*)*' | "[^"\\]*(?:\\.[^"\\]*)*" ) )
  | (?P<number> [-+]? (?: 0[xX][0-9a-fA-F]+ | (?: \d[\d_]*(?:\.\d*)? | \.\d+ ) (?: [eE][-+]?\d+ )? | inf | nan
      | Infinity )
      (?= [\s,:\]})>] | $ ) )
  | (?P<word> (?: None | True | False | null | true | false | NaN | NaT | <NA> ) (?= [\s,:\]})>] | $ ) )
  | (?P<dots> \.\.\. | … )
  | (?P<setting> [A-Za-z_]\w* = (?: <[\w.]+> | [\w.]+ (?= [\s,)] ) )? )
  | (?P<open> <tf\.Tensor: | (?: [A-Za-z_][\w.]* )? \( | \[ | \{ )
  | (?P<close> [\])}>] )
  | (?P<comma> , )
  | (?P<colon> : )
    )
    """,
    re.VERBOSE | re.DOTALL,
)
_SPACES = re.compile(r"\s*")
_DATA_KEYS = {
    "input_ids", "ids", "token_ids", "tokens", "attention_mask", "labels", "messages", "conversations", "conversation",
    "role", "from",
}  # fmt: skip
_ENOUGH = 50_000
"""Number of items after which a text counts as a list if its last character fits."""
_DEEPEST, _MOST_WAITING = 100, 1024
_KEY = re.compile(r"""['"](\w+)['"]\s*:""")


def is_written_list(text: str) -> bool:
    """Whether a text as a whole is a list, a tuple, a set, an array or a tensor as a program writes it.

    That is: numbers, quoted text, None, true and false, `...`, and lists, objects and calls of these, separated by
    commas or only space. A single object counts only if it has a key of tokenised text or of a chat, such as
    `input_ids` or `messages`: other objects may be JSON documents.
    """
    text = text.strip()
    if text[:2] in ('"[', '"{') and text.endswith(('}"', ']"')):  # JSON in JSON
        try:
            text = json.loads(text).strip()
        except ValueError:
            return False
    opening = _OPENING.match(text)
    if opening is None:
        return False
    scan = _Scan()
    if not scan.read(text):
        return False
    if opening[0] == "(":
        return scan.commas > 0
    if opening[0] == "{" and scan.is_object:
        return not _DATA_KEYS.isdisjoint(_KEY.findall(text))
    return scan.brackets > 1 or (scan.items > 0 and opening[0] in "[{")


def without_written_lists(
    rows: Iterable[tuple[str, Document]], column: str, reading: int = READING
) -> Iterator[Document]:  # fmt: skip
    """Yield the documents of a file's or data set's rows, unless they are lists written as text.

    The first `CELLS` cells with text decide: if more than half of them are lists written as text, the column holds no
    text. Fewer may be documents that look like a list.

    Args:
        rows: pairs of a row's location, for the message, and its document.
        column: the column's name, for the message.
        reading: version of how text is read; before 3, nothing is checked.

    Raises:
        DataError: the column holds lists written as text.
    """
    rows = iter(rows)
    waiting: list[Document] = []
    texts, lists, first = 0, 0, ""
    for where, document in rows if reading >= 3 else ():
        if isinstance(document.text, str) and document.text.strip():
            texts += 1
            if is_written_list(document.text):
                lists, first = lists + 1, first or where
        if lists:
            waiting.append(document)  # until the decision
        else:
            yield document
        if texts == CELLS or 2 * (texts - lists) >= CELLS or len(waiting) == _MOST_WAITING:
            break
    if 2 * lists > texts:
        raise DataError(
            f"data source {first}: column {column!r} holds a list written as text, as do {lists} of the first {texts} "
            "cells with text; store lists of token ids and chats as lists, in .jsonl or .parquet, and documents that "
            "are lists as .txt files"
        )
    yield from waiting
    yield from (document for _, document in rows)


@dataclass
class _Scan:
    """A scan of a text from its first bracket to the matching one.

    Attributes:
        items: count of numbers, quoted texts and words.
        commas: count of commas.
        brackets: count of brackets without the name of a call before them, and the outermost one.
        is_object: whether the outermost bracket holds keys.
        closings: closing brackets of those that are open.
    """

    items: int = 0
    commas: int = 0
    brackets: int = 0
    is_object: bool = False
    closings: list[str] = field(default_factory=list)

    def read(self, text: str) -> bool:
        """Scan the text; False if it is not a list as a whole."""
        place = 0
        while match := _ITEM.match(text, _SPACES.match(text, place).end()):  # pyright: ignore[reportOptionalMemberAccess]
            kind = str(match.lastgroup)
            if not self._takes(kind, match[kind]):
                return False
            place = match.end()
            if not self.closings:
                return place == len(text)
            if self.items == _ENOUGH:
                return text.endswith(self.closings[0])
        return False

    def _takes(self, kind: str, part: str) -> bool:
        """Count a part; False if it is not allowed here."""
        if kind == "open":
            self.brackets += not self.closings or len(part) == 1
            self.closings.append(_CLOSING["<" if part[0] == "<" else part[-1]])
            return len(self.closings) <= _DEEPEST
        if kind == "close":
            return self.closings.pop() == part
        if kind == "colon":
            self.is_object = self.is_object or len(self.closings) == 1
            return self.closings[-1] == "}"
        self.commas += kind == "comma"
        self.items += kind in ("text", "number", "word")
        return True
