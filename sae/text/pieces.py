"""A long text in pieces in; the tokens of the whole text out, with bounded memory.

The text is tokenised in overlapping windows. Two are joined where both have the same tokens at the same places, in the
same words: a run of at least `_AGREEING` before the seam and as many after it. Text left of the run then has no effect
on the right window, nor text right of it on the left one. A window begins at the beginning of a word or token of the
window before, so that text without spaces (digits in threes, a letter a thousand times) is cut in step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from sae.errors import DataError
from sae.text.sections import joined

WHOLE = 500_000
"""Maximum characters of a text that is tokenised at once: some 200 bytes of memory each."""
_WINDOW = 196_613  # a prime, so that windows over equal words do not end in step by chance
_OVERLAPS = (4_093, 16_381, 65_521)
_AGREEING = 16
_SLICE = 1 << 20


@dataclass(frozen=True)
class Window:
    """Tokens of the characters from `start` to `end`.

    Attributes:
        places: for each token its start and end (in characters), its id, whether it begins a word of the pre-tokenizer,
            and how many tokens directly before it are equal in all these (as the bytes of one character can be).
    """

    start: int
    end: int
    places: Int[np.ndarray, "tokens 5"]


def token_parts(tokenizer: Any, pieces: Iterable[str], name: str) -> Iterator[Int[np.ndarray, " tokens"]]:
    """Token ids of a text without special tokens, part by part; `pieces` are read as the parts need them.

    Args:
        tokenizer: a fast one.
        pieces: the text.
        name: name of the text in messages.

    Raises:
        DataError: the tokenizer does not give the positions of its tokens, or two windows agree nowhere.
    """
    for places in placed_parts(tokenizer, pieces, name):
        yield places[:, 2].astype(np.int32)


def placed_parts(tokenizer: Any, pieces: Iterable[str], name: str) -> Iterator[Int[np.ndarray, "tokens 5"]]:
    """As `token_parts`, with the places of tokens as in `Window`.

    Raises:
        DataError: as `token_parts`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(_no_parts(name, "the tokenizer does not give the positions of its tokens"))
    text = _Text(iter(pieces))
    left, first = encode(tokenizer, text.between(0, _WINDOW), 0), 0
    while text.between(left.end, left.end + 1):
        for overlap in _OVERLAPS:
            start = _start_of_next(left, overlap)
            right = encode(tokenizer, text.between(start, start + _WINDOW + overlap), start)
            seam = seam_of(left, right)
            if seam is not None:
                break
        else:
            raise DataError(_no_parts(name, f"its tokens before character {left.end:,} depend on text far away"))
        yield left.places[first : seam[0]]
        left, first = right, seam[1]
        text.drop(left.start)
    yield left.places[first:]


def slices_of(text: str) -> Iterator[str]:
    """A text in pieces, none of which is a copy of all of it."""
    return (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))


class _Text:
    """A text of which only the needed part is held. Places are counted in characters from its beginning."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces, self._buffer, self._dropped = pieces, "", 0

    def between(self, start: int, end: int) -> str:
        """The characters from `start` to `end`, or to the text's end."""
        self._buffer += joined(self._pieces, end - self._dropped - len(self._buffer))
        return self._buffer[start - self._dropped : end - self._dropped]

    def drop(self, before: int) -> None:
        """Forget the text before that place."""
        self._buffer, self._dropped = self._buffer[before - self._dropped :], before


def encode(tokenizer: Any, part: str, start: int) -> Window:
    """Tokenise the part of a text that begins with its `start`-th character. The tokenizer is a fast one."""
    encoded = tokenizer(
        part, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    places = np.zeros((len(encoded["input_ids"]), 5), dtype=np.int64)
    if len(places):
        places[:, :2] = np.asarray(encoded["offset_mapping"], dtype=np.int64) + start
        places[:, 2] = encoded["input_ids"]
        words = np.array([-1 if word is None else word for word in encoded.word_ids()])
        places[1:, 3] = words[1:] != words[:-1]
    repeated = np.flatnonzero((places[1:] == places[:-1]).all(1)) + 1
    for number in repeated:
        places[number, 4] = places[number - 1, 4] + 1
    return Window(start, start + len(part), places)


def _start_of_next(left: Window, overlap: int) -> int:
    """Where the next window begins: with a word of the left one, about `overlap` characters before its end.

    It begins with any token if no word begins nearby, as in a text without spaces.
    """
    place = left.end - overlap
    following = left.places[left.places[:, 0] >= place]
    words = following[(following[:, 3] == 1) & (following[:, 0] < place + overlap // 4)]
    return int((words if len(words) else following)[0, 0]) if len(following) else place


def seam_of(left: Window, right: Window) -> tuple[int, int] | None:
    """The middle of the longest run of equal tokens, as its index in each window; None if no run is long enough."""
    begin = int(np.searchsorted(left.places[:, 0], right.start))
    numbers = {
        tuple(place): number for number, place in enumerate(right.places[right.places[:, 0] < left.end].tolist())
    }
    partners = np.array([numbers.get(tuple(place), -1) for place in left.places[begin:].tolist()], dtype=np.int64)
    matched = np.flatnonzero(partners >= 0)
    breaks = (np.diff(matched) != 1) | (np.diff(partners[matched]) != 1)
    run = max(np.split(matched, np.flatnonzero(breaks) + 1), key=len)
    if len(run) < 2 * _AGREEING:
        return None
    middle = int(run[len(run) // 2])
    return begin + middle, int(partners[middle])


def _no_parts(name: str, reason: str) -> str:
    return (
        f"document {name!r}: too long to be tokenised at once, and it cannot be joined from pieces: {reason}; set "
        "data.section_characters, such as 10000, to cut it"
    )
