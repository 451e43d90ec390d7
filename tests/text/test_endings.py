"""The last tokens of long texts, found from their ends, against the same texts tokenised in one go."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sae.model.language_model import LanguageModel
from sae.text import endings
from sae.text.endings import last_tokens
from tests.support.quick import quick_for
from tests.support.tokenizer_kinds import KINDS, make
from tests.text.test_pieces import shapes, source

LEARNT = 20_000
FROM_THE_BEGINNING = {("llama3", "digits"), ("bert", "letters"), ("bert", "digits"), ("bert", "one letter")}
"""Where what stands at the end depends on how far it is from the beginning."""


def ends(text: str) -> Iterator[tuple[str, str]]:
    yield from shapes(text)
    yield "one letter", "a" * len(text)
    yield "spaces before the end", f"{text[:20_000]}{' ' * 20_000}{text[-500:]}"
    yield "a word before the end", f"{''.join(text[:30_000].split())} {text[-300:]}\r\n\r\n"
    yield "rare", "".join(random.Random(3).choices(["漢字", "😀", "e\u0301", "ﬁ", " ", "\n", "½", "ab"], k=20_000))


@pytest.fixture
def from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Marks of the texts that were read from there; all but short ones count as long."""
    found: list[str] = []
    original = endings.placed_parts

    def count(*arguments: Any) -> Iterator[Any]:
        found.append("read")
        return original(*arguments)

    monkeypatch.setattr(endings, "placed_parts", count)
    monkeypatch.setattr(endings, "LONG", 20_000)
    return found


@pytest.mark.parametrize("kind", quick_for(["bert", "gpt2", "t5"], KINDS))
def test_the_end_has_the_tokens_of_the_whole(kind: str, from_the_beginning: list[str]) -> None:
    text = source(100_000)
    tokenizer = make(kind, text[:LEARNT])
    for shape, shaped in ends(text[60_000:]):
        from_the_beginning.clear()
        whole = tokenizer(shaped, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        expected = np.array([(*place, token) for place, token in zip(*whole_of(whole), strict=True)])
        for count in (127, 1) if shape == "lines" else (127,):
            [found] = last_tokens(tokenizer, [shaped], count)
            assert found.tolist() == expected[-count:].tolist(), (kind, shape, count)
        if shape in ("lines", "one line"):
            assert not from_the_beginning, (kind, shape)
        if (kind, shape) in FROM_THE_BEGINNING:
            assert from_the_beginning, (kind, shape)


def whole_of(encoded: Any) -> tuple[list[tuple[int, int]], list[int]]:
    return encoded["offset_mapping"], encoded["input_ids"]


def test_no_more_is_tokenised_than_needed(language_model: LanguageModel) -> None:
    """Of twenty megabytes, some thousands of characters; of many short texts, few at a time."""
    tokenizer: Any = language_model.tokenizer
    given: list[int] = []

    class Counting:
        is_fast = True
        get_vocab = tokenizer.get_vocab

        def __call__(self, texts: str | list[str], **settings: Any) -> Any:
            given.append(sum(map(len, texts)))
            return tokenizer(texts, **settings)

    sentence = "the river keeps a stone house, and winter the garden: number 17\n"
    [found] = last_tokens(Counting(), [sentence * 300_000], 127)
    assert found[:, 2].tolist() == tokenizer(sentence * 50, add_special_tokens=False)["input_ids"][-127:]
    assert max(given) < 20_000
    assert sum(given) < 500_000
    given.clear()
    texts = [sentence * (100 + number) for number in range(200)]
    found = last_tokens(Counting(), texts, 9)
    assert max(given) <= 500_000
    for text, places in zip(texts[::50], found[::50], strict=True):
        assert places[:, 2].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][-9:]


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand(language_model: LanguageModel) -> None:
    tokenizer: Any = language_model.tokenizer

    class Slow:
        is_fast = False

        def __call__(self, texts: list[str], **settings: Any) -> Any:
            assert "return_offsets_mapping" not in settings
            return tokenizer(texts, **settings)

    texts = ["the river", "", "a stone house"]
    for one, other in zip(last_tokens(Slow(), texts, 3), last_tokens(tokenizer, texts, 3), strict=True):
        assert one[:, 2].tolist() == other[:, 2].tolist()
    assert last_tokens(Slow(), [], 3) == last_tokens(tokenizer, [], 3) == []
