"""Single-token words of a tokenizer's vocabulary, with their first letters as labels."""

from __future__ import annotations

from typing import Any

from sae.dictionary.token_policy import TokenPolicy
from sae.errors import DataError
from sae.model.vocabulary import Vocabulary
from sae.numerics.seeding import numpy_generator
from sae.probing.examples import Examples, numbered, opening
from sae.probing.settings import LetterConfig

LEAST_WORDS, LEAST_LENGTH, LEAST_LETTERS = 20, 3, 2


def vocabulary_words(tokenizer: Any) -> dict[int, str]:
    """Lower-case words by token id, for tokens that are a space followed by at least three ASCII letters."""
    vocabulary = Vocabulary.of(tokenizer)
    words = {}
    for token, content in enumerate(vocabulary.tokens):
        word = content[1:]
        if token in vocabulary.special or content[:1] != b" " or len(word) < LEAST_LENGTH:
            continue
        if word.isalpha() and word.isascii():
            words[token] = word.decode().lower()
    return words


def letter_examples(tokenizer: Any, policy: TokenPolicy, bos: int | None, settings: LetterConfig) -> Examples:
    """Contexts of BOS, the prompt and a word, labelled with the word's first letter; words are drawn by seed.

    Letters with fewer than 20 words are left out.

    Raises:
        DataError: the vocabulary has words of fewer than two letters, or the policy masks the word's position.
    """
    words = vocabulary_words(tokenizer)
    by_letter: dict[str, list[int]] = {}
    for token, word in words.items():
        by_letter.setdefault(word[0], []).append(token)
    enough = {letter: tokens for letter, tokens in sorted(by_letter.items()) if len(tokens) >= LEAST_WORDS}
    if len(enough) < LEAST_LETTERS:
        raise DataError(
            f"first letters: the vocabulary has {len(words):,} words of one token, and at least {LEAST_WORDS} for "
            f"{len(enough)} letters; {LEAST_LETTERS} letters are needed: this model's tokens are too short for this"
        )
    prompt = tokenizer(settings.prompt, add_special_tokens=False)["input_ids"] if settings.prompt else []
    begin = (*opening(policy, bos), *prompt)
    if len(begin) < policy.masked_positions:
        raise DataError(
            f"letters.prompt={settings.prompt!r}: the word is at position {len(begin)}, and the first "
            f"{policy.masked_positions} are masked; give a longer prompt"
        )
    rng = numpy_generator("first letters: words", settings.seed)
    contexts: list[tuple[int, ...]] = []
    labels: list[str] = []
    for letter, tokens in enough.items():
        for token in sorted(rng.permutation(tokens)[: settings.words].tolist()):
            contexts.append((*begin, token))
            labels.append(letter)
    count = len(contexts)
    return Examples(
        tuple(contexts), tuple(range(count)), (len(begin),) * count, tuple(range(count)), tuple(labels),
        numbered(words[context[-1]] for context in contexts), 0,  # `The` and `the` are on one side of a split
    )  # fmt: skip
