"""The last tokens of texts, which are those of the whole text, found from its end: nobody tokenises a novel for them.

Where does a long text's end begin to be tokenised as it is in the whole? Tokenizers have this in common: what follows a
token's end is tokenised as if the text began there, but for the first few tokens. So a part is tokenised from every
place of a stretch that no token of the vocabulary spans, one of which is a token's end in the whole. Where all of these
parts come to the same tokens, the whole does too. Where they don't (digits in threes), the text is read from its
beginning, in windows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from sae.errors import DataError
from sae.text.pieces import Window, encode, placed_parts, seam_of

LONG = 200_000
"""Characters of a text from which on its end is looked for."""
_AT_ONCE = 500_000
_PART = 509
"""Characters that come to the same tokens: a part of a hundred tokens or more."""
_PER_TOKEN = 8
_ENDS = (1, 4, 16)
_SLICE = 1 << 20

Places = Int[np.ndarray, "tokens 3"]


def last_tokens(tokenizer: Any, texts: Sequence[str], count: int) -> list[Places]:
    """The last tokens of each text without special tokens: first character, the end, and id.

    Memory is that of a few hundred thousand characters, however long the texts are, with a fast tokenizer. A slow one
    does not say where its tokens stand: first character and end are 0.

    Args:
        tokenizer: the language model's.
        texts: any.
        count: of tokens, at most, that are wanted of a text.
    """
    if not getattr(tokenizer, "is_fast", False):
        if not texts:
            return []
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [_placed(ids[-count:], [(0, 0)] * len(ids[-count:])) for ids in encoded["input_ids"]]
    short = (text for text in texts if len(text) < LONG)
    of_short = _of_short(tokenizer, short, count)
    widest = max(map(len, tokenizer.get_vocab())) if any(len(text) >= LONG for text in texts) else 0
    return [next(of_short) if len(text) < LONG else _of_long(tokenizer, text, count, widest) for text in texts]


def _of_short(tokenizer: Any, texts: Iterator[str], count: int) -> Iterator[Places]:
    """Many at once, which a fast tokenizer spreads over all cores."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and characters + len(text) > _AT_ONCE:
            yield from _whole(tokenizer, batch, count)
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield from _whole(tokenizer, batch, count)


def _of_long(tokenizer: Any, text: str, count: int, widest: int) -> Places:
    for factor in _ENDS:
        characters = factor * (_PER_TOKEN * count + 8 * _PART)
        if characters > len(text) // 2:
            break
        found = _of_end(tokenizer, text, len(text) - characters, count, widest)
        if found is not None:
            return found
    slices = (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))
    kept: deque[Any] = deque(maxlen=count)
    try:
        for part in placed_parts(tokenizer, slices, ""):
            kept.extend(part[-count:, :3])
    except DataError:  # no windows agree
        return _whole(tokenizer, [text], count)[0]
    return np.array(kept, dtype=np.int64).reshape(-1, 3)


def _of_end(tokenizer: Any, text: str, start: int, count: int, widest: int) -> Places | None:
    """The last tokens by what stands from `start` on; None where tokens before it may matter.

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
    found = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True, verbose=False
    )
    return [
        _placed(ids[-count:], places[-count:])
        for ids, places in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def _placed(ids: Sequence[int], places: Sequence[tuple[int, int]]) -> Places:
    return np.array([(*place, token) for place, token in zip(places, ids, strict=True)], dtype=np.int64).reshape(-1, 3)
