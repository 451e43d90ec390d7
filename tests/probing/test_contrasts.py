"""Texts on two sides, words and their spans, and files of texts; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae.errors import DataError
from sae.probing.contrasts import contrast, texts_of, tokens_of_word
from sae.probing.data import read_texts


def test_two_sides_are_labelled() -> None:
    data = contrast(["a b", " ", "c"], ["d"])
    assert (data.texts, data.labels, data.left_out) == (("a b", "c", "d"), ("with", "with", "without"), 1)


def test_a_text_on_both_sides_is_refused() -> None:
    with pytest.raises(DataError, match=r"text 'same' and 1 more: with and without the concept; remove it from one"):
        contrast(["one", "same\n", "two"], ["same", "two", "three"])


def test_an_empty_side_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"texts without the concept: no text; give some"):
        contrast(["one"], ["", " "])
    with pytest.raises(DataError, match=r"texts with the concept: no text in '.*empty.txt'; give some"):
        contrast(tmp_path / "empty.txt", ["one"])


def test_a_word_is_found_where_it_is_whole() -> None:
    data = tokens_of_word("cat", ["The cat, cats and Cat.", "no such", "cat", "concatenate"])
    assert data.texts == ("The cat, cats and Cat.", "cat")
    assert data.spans == (((4, 7, "with"),), ((0, 3, "with"),))
    assert tokens_of_word("C++", ["in C++ or C"]).spans == (((3, 6, "with"),),)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dog", r"word 'dog': in none of 2 texts; check its spelling and case, or give others"),
        (" ", "word '': expected"),
    ],
)
def test_a_missing_word_is_refused(word: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokens_of_word(word, ["a cat", "Dog"])


def test_files_of_texts(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\ufeffone\ntwo\n", encoding="utf-8")
    (tmp_path / "paragraphs.txt").write_text("one\nand more\n\ntwo\n \n\nthree\n", encoding="utf-8")
    (tmp_path / "table.csv").write_text('text,other\n"one, two",1\nthree,2\n', encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n', encoding="utf-8")
    assert texts_of(tmp_path / "lines.txt", "") == (["one", "two"], 1)
    assert texts_of(str(tmp_path / "paragraphs.txt"), "")[0] == ["one\nand more", "two", "three"]
    assert read_texts(tmp_path / "table.csv") == ["one, two", "three"]
    assert texts_of(tmp_path / "rows.jsonl", "") == (["one"], 1)
    (tmp_path / "wrong.csv").write_text("words,other\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no column 'text' or 'prompt'; name the column of the texts 'text' \("):
        read_texts(tmp_path / "wrong.csv")
    (tmp_path / "wrong.jsonl").write_text('{"words": "a", "other": 1}\n')
    with pytest.raises(DataError, match=r"name the column of the texts 'text' \(it has: words, other\)"):
        read_texts(tmp_path / "wrong.jsonl")
    (tmp_path / "numbers.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    with pytest.raises(DataError, match=r"row 2: column 'text' holds a number \(7\); convert it to text"):
        read_texts(tmp_path / "numbers.jsonl")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        read_texts(tmp_path / "missing.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
        read_texts(tmp_path / "binary.txt")
