"""Pieces of a document's text in; sections of it out, cut at line ends if there are any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def sections(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """Sections of about `characters` characters; only one section and one piece are held in memory.

    A section ends with the first line end after `characters`. If there is none before twice as many, it ends before the
    last space in between; in a text without spaces, at twice `characters`. The last section may be shorter.
    """
    rest, text, start, ended = iter(pieces), "", 0, False
    while True:
        while not ended and len(text) - start <= 2 * characters + 1:
            piece = next(rest, None)
            if piece is None:
                ended = True
            else:
                text, start = text[start:] + piece, 0
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
