"""Pieces of a text in; longer pieces out, or sections of a document, cut at line ends if there are any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def joined(pieces: Iterator[str], characters: int) -> str:
    """The next pieces as one text of at least this many characters; shorter only if no pieces are left."""
    parts, length = [], 0
    while length < characters and (piece := next(pieces, None)) is not None:
        parts.append(piece)
        length += len(piece)
    return "".join(parts)


def sections(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """Sections of about `characters` characters; only one section and one piece are held in memory.

    A section ends with the first line end after `characters`. If there is none before twice as many, it ends before the
    last space in between; in a text without spaces, at twice `characters`. The last section may be shorter.
    """
    rest, text, start = iter(pieces), "", 0
    while True:
        missing = 2 * characters + 2 - (len(text) - start)
        if missing > 0:
            text, start = text[start:] + joined(rest, missing), 0
        if start == len(text):
            return
        end = _end(text, start, characters)
        yield text[start:end]
        start = end


def _end(text: str, start: int, characters: int) -> int:
    if len(text) - start <= characters:
        return len(text)
    newline = text.find("\n", start + characters, start + 2 * characters + 1)
    if newline >= 0:
        return newline + 1
    if len(text) - start <= 2 * characters:
        return len(text)
    space = text.rfind(" ", start + characters, start + 2 * characters)
    return space if space >= 0 else start + 2 * characters
