"""The last tokens of texts, found from the end, without tokenising a novel for them.

From which place on does a long text's end have the same tokens as in the whole text? Tokenizers have this in common:
text after a token's end is tokenised as if the text began there, except for the first few tokens. So a part is
tokenised from every place of a stretch longer than any token of the vocabulary; one of these places is a token's end
in the whole text. If all of these parts arrive at the same tokens, so does the whole text. If they do not (digits in
threes), the text is read from its beginning, in windows.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from sae.errors import DataError
from sae.text.pieces import Window, encode, placed_parts, seam_of, slices_of

LONG = 200_000
"""Texts with at least this many characters are tokenised from their end."""
_AT_ONCE = 300_000
"""A batch of short texts has at most this many characters, and those of one more text."""
_PART = 509
"""Characters in which parts must arrive at the same tokens: a hundred tokens or more."""
_PER_TOKEN = 8
_ENDS = (1, 4, 16)

Places = Int[np.ndarray, "tokens 3"]


def last_tokens(tokenizer: Any, texts: Sequence[str], count: int) -> list[Places]:
    """The last tokens of each text, without special tokens: start, end (in characters) and id.

    With a fast tokenizer, memory is that of a few hundred thousand characters, however long the texts are. A slow one
    does not give positions: start and end are 0.

    Args:
        tokenizer: the language model's.
        texts: of any length.
        count: maximum number of tokens per text.
    """
    if not getattr(tokenizer, "is_fast", False):
        if not texts:
            return []
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [_placed(ids[-count:], [(0, 0)] * len(ids[-count:])) for ids in encoded["input_ids"]]
    short = [text for text in texts if len(text) < LONG]
    short_places = _last_of_short(tokenizer, short, count)
    widest = max(map(len, tokenizer.get_vocab())) if len(short) < len(texts) else 0
    return [next(short_places) if len(text) < LONG else _last_of_long(tokenizer, text, count, widest) for text in texts]


def _last_of_short(tokenizer: Any, texts: Sequence[str], count: int) -> Iterator[Places]:
    """The last tokens of short texts, many at once, which a fast tokenizer spreads over all cores."""
    batches = (end // _AT_ONCE for end in itertools.accumulate(map(len, texts)))
    for _, batch in itertools.groupby(zip(batches, texts, strict=True), key=operator.itemgetter(0)):
        yield from _whole(tokenizer, [text for _, text in batch], count)


def _last_of_long(tokenizer: Any, text: str, count: int, widest: int) -> Places:
    for factor in _ENDS:
        characters = factor * (_PER_TOKEN * count + 8 * _PART)
        if characters > len(text) // 2:
            break
        places = _last_from(tokenizer, text, len(text) - characters, count, widest)
        if places is not None:
            return places
    last: deque[Any] = deque(maxlen=count)
    try:
        for part in placed_parts(tokenizer, slices_of(text), ""):
            last.extend(part[-count:, :3])
    except DataError:  # no windows agree
        return _whole(tokenizer, [text], count)[0]
    return np.array(last, dtype=np.int64).reshape(-1, 3)


def _last_from(tokenizer: Any, text: str, start: int, count: int, widest: int) -> Places | None:
    """The last tokens, from the text after `start`; None if the text before it may affect them.

    Args:
        start: where the stretch begins.
        widest: characters of the longest token.
    """
    end = encode(tokenizer, text[start:], start)
    latest = len(end.places) - count
    compared = int(np.searchsorted(end.places[:, 0], start + widest + _PART))
    beginning = Window(start, start + widest + _PART, end.places[:compared])
    for place in range(start + 1, start + widest + 1):
        seam = seam_of(beginning, encode(tokenizer, text[place : place + _PART], place))
        if seam is None or seam[0] > latest:
            return None
    return end.places[-count:, :3]


def _whole(tokenizer: Any, texts: list[str], count: int) -> list[Places]:
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    return [
        _placed(ids[-count:], places[-count:])
        for ids, places in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _placed(ids: Sequence[int], places: Sequence[tuple[int, int]]) -> Places:
    return np.array([(*place, token) for place, token in zip(places, ids, strict=True)], dtype=np.int64).reshape(-1, 3)
