"""Texts with and without a concept, or tokens of a word and other tokens, as labelled texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sae.errors import DataError
from sae.files.paths import expanded, name_of
from sae.files.printable import one_line
from sae.model.vocabulary import Vocabulary
from sae.probing.activations import RowTexts
from sae.probing.data import LabelledTexts, read_texts
from sae.probing.examples import Examples
from sae.text.digests import normalised_digest

WITH, WITHOUT = "with", "without"
Texts = str | Path | Sequence[str]
_SHOWN = 60


def texts_of(texts: Texts, what: str) -> tuple[list[str], int]:
    """Texts as they are, or those of a file, without empty ones; and the number of empty ones.

    Args:
        texts: texts, or a file (see `sae.probing.data.read_texts`).
        what: which texts these are, for messages.

    Raises:
        DataError: the file cannot be read, or there is no text.
    """
    is_file = isinstance(texts, str | Path)
    found = read_texts(expanded(texts)) if is_file else list(texts)
    kept = [text.encode("utf-8", "replace").decode() for text in found if text.strip()]
    if not kept:
        raise DataError(f"{what}: no text{f' in {str(texts)!r}' if is_file else ''}; give some")
    return kept, len(found) - len(kept)


def contrast(having: Texts, lacking: Texts) -> LabelledTexts:
    """Texts with the labels `with` and `without`.

    Args:
        having: texts with the concept, or a file of them.
        lacking: texts without it.

    Raises:
        DataError: a side has no text, or a text is on both sides.
    """
    (positive, blank), (negative, also_blank) = (
        texts_of(having, "texts with the concept"),
        texts_of(lacking, "texts without the concept"),
    )
    sides = [{normalised_digest([text]): text for text in texts} for texts in (positive, negative)]
    both = [text for digest, text in sides[0].items() if digest in sides[1]]
    if both:
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        raise DataError(
            f"text {one_line(both[0], _SHOWN)!r}{more}: with and without the concept; remove it from one side"
        )
    labels = [WITH] * len(positive) + [WITHOUT] * len(negative)
    name = name_of(Path(having).stem) if isinstance(having, str | Path) else "texts"
    return LabelledTexts(name, (*positive, *negative), tuple(labels), left_out=blank + also_blank)


def tokens_of_word(word: str, texts: Texts) -> LabelledTexts:
    """The texts that have the word, with a span for each of its occurrences, whose label is `with`.

    An occurrence is the same characters, in the same case, and no part of a longer word. If the tokenizer cuts the word
    into several tokens, all of them are examples.

    Raises:
        DataError: the word is empty, or in none of the texts.
    """
    word = word.strip()
    if not word:
        raise DataError(f"word {word!r}: expected at least one character that is not a space")
    found, blank = texts_of(texts, f"texts with the word {word!r}")
    before, after = (r"(?<!\w)" if re.match(r"\w", word) else "", r"(?!\w)" if re.search(r"\w$", word) else "")
    pattern = re.compile(f"{before}{re.escape(word)}{after}")
    spans = {text: tuple((*match.span(), WITH) for match in pattern.finditer(text)) for text in found}
    having = [text for text in found if spans[text]]
    if not having:
        raise DataError(f"word {word!r}: in none of {len(found):,} texts; check its spelling and case, or give others")
    return LabelledTexts(word, tuple(having), spans=tuple(spans[text] for text in having), left_out=blank)


def row_texts(examples: Examples, vocabulary: Vocabulary) -> RowTexts:
    """The texts of the tokens of examples."""
    pieces = tuple(tuple(vocabulary.pieces(context)) for context in examples.contexts)
    return RowTexts(pieces, examples.context, examples.position)
