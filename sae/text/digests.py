"""Sets of 16-byte hashes, which tell whether a document has been read before."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from sae.text.document import READING, Chat, LongText, TokenIds, digest_of, digest_of_pieces, essential

_RECENT = 1 << 16
_LONG = 1_000_000
"""Characters of a text's beginning that are compared first."""


class DigestSet:
    """A set of 16-byte hashes: a sorted array, and the newest, which are merged into it as they become many."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype="S16")
        self._recent: set[bytes] = set()

    def __contains__(self, digest: bytes) -> bool:
        if digest in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.bytes_(digest)))
        return place < len(self._sorted) and bool(self._sorted[place] == np.bytes_(digest))

    def add(self, digest: bytes) -> bool:
        """Add a hash; False if it was there already."""
        if digest in self:
            return False
        self._recent.add(digest)
        if len(self._recent) > max(_RECENT, len(self._sorted) // 8):
            self._sorted = np.concatenate([self._sorted, np.array(list(self._recent), dtype="S16")])
            self._sorted.sort()
            self._recent = set()
        return True


class ReadTexts:
    """Contents that have been read. Long texts are compared by their beginnings, and in full only if these agree.

    Texts are equal if they agree without a byte order mark, with line ends as '\\n', and without surrounding space;
    lists of ids and chats are equal if their `form` is.

    Args:
        form: converts a list of ids or a chat for comparison. A chat may become a text, and then equals that text.
        reading: version of how text is read. Before 3, lists of ids and chats are compared as they are. Before 2,
            texts are not normalised, and a text read in pieces is never equal to one that is not.
    """

    def __init__(
        self, form: Callable[[TokenIds | Chat], str | TokenIds | Chat] = essential, reading: int = READING
    ) -> None:
        self._form, self._exactly, self._digests = form if reading >= 3 else None, reading < 2, DigestSet()
        self._long: dict[bytes, list[_Long]] = {}

    def add(self, content: str | LongText | TokenIds | Chat) -> bool:
        """Add a content; False if an equal one has been read already."""
        if self._form is not None and isinstance(content, TokenIds | Chat):
            content = self._form(content)
        if isinstance(content, TokenIds | Chat) or (self._exactly and isinstance(content, str)):
            return self._digests.add(digest_of(content))
        beginning = content.beginning if self._exactly and isinstance(content, LongText) else _beginning(content)
        if not self._exactly and len(beginning) < _LONG:
            return self._digests.add(digest_of(beginning))
        alike = self._long.setdefault(digest_of(beginning), [])
        long = _Long(content, digest_of_pieces if self._exactly else normalised_digest)
        if any(long.place is not None and long.place == other.place for other in alike) or any(
            long.digest == other.digest for other in alike
        ):
            return False
        alike.append(long)
        return True


class _Long:
    """A long text that is not kept in memory. If it can be read again, it is hashed only when another begins alike.

    Attributes:
        place: the file whose whole content it is; None if unknown.
    """

    def __init__(self, content: str | LongText, digest_of: Callable[[Iterable[str]], bytes]) -> None:
        self.place: tuple[int, int] | None = None
        if isinstance(content, str):
            self.digest = digest_of([content])
        else:
            self.place, self._pieces, self._digest_of = content.place, content.pieces, digest_of

    @functools.cached_property
    def digest(self) -> bytes:
        """A hash of the whole text."""
        return self._digest_of(self._pieces())


def normalised_digest(pieces: Iterable[str]) -> bytes:
    """A hash that is the same for texts that differ only in line ends, a byte order mark and surrounding space."""
    return digest_of_pieces(_normalised(pieces), stripped=True)


def _normalised(pieces: Iterable[str]) -> Iterator[str]:
    """A text's pieces without byte order mark, with line ends as '\\n', and without space at the text's beginning."""
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    begun = False
    for number, piece in enumerate(itertools.chain(pieces, [None])):
        text = lines.decode((piece or "").removeprefix("\ufeff" if number == 0 else ""), final=piece is None)
        if not begun:
            text = text.lstrip()
            begun = bool(text)
        if text:
            yield text


def _beginning(content: str | LongText) -> str:
    """The first `_LONG` characters, normalised and without space at the text's end; all of a shorter text."""
    if isinstance(content, LongText):
        text = _first(_normalised([content.beginning]), _LONG)
        return text if len(text) == _LONG else _first(_normalised(content.pieces()), _LONG)
    return _first(_normalised([content]), _LONG)


def _first(pieces: Iterator[str], characters: int) -> str:
    """A text's first characters, without space at the text's end; no more than these are held in memory."""
    text = ""
    for piece in pieces:
        head = piece[: characters - len(text)]
        text += head
        if len(text) == characters and (not text[-1].isspace() or piece[len(head) :].strip()):
            return text
    return text.rstrip()
