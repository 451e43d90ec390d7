"""Text that would be read wrongly, in part, or with too much memory, and is refused by file and place."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from sae.errors import DataError
from sae.text.corpus import read_documents
from sae.text.digests import ReadTexts
from sae.text.document import Chat, Content, LongText

WORDS = "Some words of a text, and more of them. " * 20
ENGLISH, RUSSIAN = WORDS, "Немного слов какого-то текста. " * 20
WAY_OUT = "cut its text into several records, or give it as .txt, which is read in pieces"


def contents(source: Path, column: str = "text", reading: int = 4) -> list[Content]:
    return [document.text for document in read_documents(str(source), column=column, reading=reading)]


@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
@pytest.mark.parametrize("kind", [".txt", ".md.gz", ".csv", ".tsv", ".jsonl", ".json.bz2"])
def test_other_encodings_without_a_mark_are_named_with_the_command_that_converts_them(
    encoding: str, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{kind}"
    for text in (ENGLISH, RUSSIAN, "a\n"):
        content = (json.dumps({"text": text}, ensure_ascii=False) if "json" in kind else "text\n" + text).encode(
            encoding
        )
        path.write_bytes({"gz": gzip.compress, "bz2": bz2.compress}.get(kind.rpartition(".")[2], bytes)(content))
        with pytest.raises(
            DataError,
            match=rf"a\S+': NULs from byte [0-3] on: it looks like {encoding}, .*iconv -f {encoding} -t UTF-8$",
        ):
            contents(tmp_path)


def test_a_stray_nul_is_a_character_and_a_run_of_them_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("abc\0def", WORDS * 500 + "\0" + WORDS):
        path.write_text(text)
        assert contents(path) == [text]
    before = 20_000 * "word "
    path.write_text(before + "\0" * 4096 + WORDS)
    with pytest.raises(DataError, match=r"a.txt': NULs from byte 100,000 on, .*: this is not text; move the file away"):
        contents(path)


@pytest.mark.parametrize("module", [bz2, lzma])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
def test_streams_after_one_another_are_all_read_or_the_file_is_refused(module, kind: str, tmp_path: Path) -> None:
    suffix, zeros = (".bz2", 3) if module is bz2 else (".xz", 8)
    rows = {".csv": "text\n", ".txt": ""}.get(kind, ""), "first", "second" * 100_000
    parts = [f"{row}\n" if kind in (".csv", ".txt") else json.dumps({"text": row}) + "\n" for row in rows[1:]]
    first, second = module.compress((rows[0] + parts[0]).encode()), module.compress(parts[1].encode())
    whole = ["first\n" + rows[2] + "\n"] if kind == ".txt" else list(rows[1:])
    path = tmp_path / f"a{kind}{suffix}"
    for good in (first + second, first + bytes(zeros) + second + bytes(zeros)):
        path.write_bytes(good)
        assert contents(path) == whole
    flipped = bytes([second[0], second[1] ^ 0x20]) + second[2:]
    for bad in (first + flipped, first + second[:-9], first + b"other", first + bytes(zeros) + b"x" + second):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=rf"a\{kind}\{suffix}': cannot be read \("):
            contents(path)
    path.write_bytes(first + bytes(5))
    if module is lzma:
        with pytest.raises(
            DataError, match=r"cannot be read \(5 zeros after a compressed stream, not a multiple of 4\)"
        ):
            contents(path)
    path.write_bytes(first + flipped)
    assert contents(path, reading=3) == (["first\n"] if kind == ".txt" else ["first"])


@pytest.mark.parametrize("module", [bz2, lzma])
def test_a_stream_that_ends_where_a_read_ends_is_not_the_last(
    module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("a.txt.bz2" if module is bz2 else "a.txt.xz")
    first, second = module.compress(b"first\n"), module.compress(b"second\n")
    monkeypatch.setattr("sae.text.binary.BYTES_AT_ONCE", len(first))
    path.write_bytes(first + second)
    assert contents(path) == ["first\nsecond\n"]


RECORDS = {
    ".jsonl": (b'{"text": "good"}\n{"text": "', b'"}\n', "line 2 has more than 1,000,000 bytes"),
    ".json": (b'[{"text": "good"}, {"text": "', b'"}]', "record 2 has more than 1,000,000 characters"),
    ".csv": (b'text\ngood\n"', b'"\n', "the record from line 3 on has more than 1,000,000 characters"),
    ".tsv": (b'text\ngood\n"words\nand\n', b'"\n', "the record from line 3 on has more than 1,000,000 characters"),
    ".ndjson": (b'{"text": "good"}\n', b"\n", "line 2 has more than 1,000,000 bytes"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_without_end_is_never_held(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.text.limits.MOST_IN_RECORD", 1_000_000)
    begin, end, problem = RECORDS[kind]
    filling = (b" " if kind == ".ndjson" else b"word ") * 100_000
    with gzip.open(tmp_path / f"a{kind}.gz", "wb", compresslevel=1) as file:
        file.write(begin)
        for _ in range(300):
            file.write(filling)
        file.write(end)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"a\{kind}\.gz': {problem}; {WAY_OUT}"):
            contents(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_record_may_be_as_long_as_the_bound_and_no_longer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.text.files._BYTES_AT_ONCE", 64)
    path, text = tmp_path / f"a{kind}", WORDS
    record = f'"{text}"\r\n' if kind == ".csv" else f'{{"text": "{text}"}}\r\n'
    path.write_bytes(("text\r\n" * (kind == ".csv") + record * 3).encode())
    monkeypatch.setattr("sae.text.limits.MOST_IN_RECORD", len(record if kind == ".csv" else record.rstrip()))
    assert contents(path) == [text] * 3
    monkeypatch.setattr("sae.text.limits.MOST_IN_RECORD", len(record.rstrip()) - 1)
    with pytest.raises(DataError, match="has more than"):
        contents(path)
    assert contents(path, reading=3) == [text] * 3


def test_space_between_the_words_of_a_long_text_is_not_held() -> None:
    def pieces(space: int, end: str) -> Iterator[str]:
        yield "\ufeffword"
        for _ in range(space):
            yield " \n" * 50_000
        yield end

    def text(space: int, end: str = "") -> LongText:
        return LongText(lambda: pieces(space, end), None, "\ufeffword" + " \n" * 50_000)

    tracemalloc.start()
    try:
        read = ReadTexts()
        assert [read.add(text(space, "end")) for space in (300, 300, 299)] == [True, False, True]
        assert [read.add(text(300)), read.add("word\n"), read.add(text(300, "\r\n "))] == [True, False, False]
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_a_key_that_is_there_twice_is_refused_where_it_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}"
    place = {".jsonl": "line", ".json": "record"}[kind]
    path.write_text('{"text": "x"}\n{"text": "first", "text": "second"}\n')
    with pytest.raises(DataError, match=rf"a{kind}, {place} 2: key 'text' is there more than once; rename or remove"):
        contents(path)
    assert contents(path, reading=3) == ["x", "second"]
    path.write_text('{"text": [{"role": "user", "content": "first", "content": "second"}]}\n')
    with pytest.raises(DataError, match=rf"{place} 1: key 'content' is there more than once"):
        contents(path)
    path.write_text('{"text": "x", "n": 1, "n": 2, "other": {"text": 1, "text": 2}}\n')
    assert contents(path) == ["x"]
    path.write_text('{"n": 1, "n": 2, "text": [{"role": "user", "content": "Hi"}]}\n')
    assert contents(path) == [Chat(({"role": "user", "content": "Hi"},))]


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_a_column_that_is_there_twice_is_refused_where_it_is_read(kind: str, tmp_path: Path) -> None:
    def write(rows: list[list[str]]) -> Path:
        out = io.StringIO()
        csv.writer(out, delimiter="\t" if kind == ".tsv" else ",").writerows(rows)
        (tmp_path / f"a{kind}").write_text(out.getvalue())
        return tmp_path / f"a{kind}"

    path = write([["text", "n", "text"], ["first", "1", "second"]])
    with pytest.raises(DataError, match=rf"a{kind}, line 1: column 'text' is there more than once"):
        contents(path)
    assert contents(path, reading=3) == ["second"]
    assert contents(path, "n") == ["1"]


def test_parquet_columns_of_one_name(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "text", "n"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a.parquet: column 'text' is there more than once; rename or remove all but one"
    ):
        contents(tmp_path / "a.parquet")
    assert contents(tmp_path / "a.parquet", "n") == ["c"]


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
def test_a_quote_that_nothing_closes_is_named_by_the_line_that_its_row_begins_with(kind: str, tmp_path: Path) -> None:
    path, comma = tmp_path / f"a{kind}", "\t" if kind == ".tsv" else ","
    rows = [f"text{comma}n", f'"one\nand more"{comma}1', f'"Hello there{comma}1', f"foo{comma}0"]
    path.write_text("\n".join(rows))
    with pytest.raises(
        DataError, match=rf"a{kind}': line 4 is not CSV: a double quote begins a cell, and none closes it"
    ):
        contents(path)
    path.write_text("\n".join([*rows, f'"she said"{comma}1']))
    with pytest.raises(DataError, match=r"line 6 is not CSV \(.* expected after '\"'\); its row begins with line 4"):
        contents(path)
    path.write_text("\n".join([*rows[:2], f'5" of "snow"{comma}1']))
    assert contents(path) == ["one\nand more", '5" of "snow"']


@pytest.mark.parametrize(
    ("opener", "source"),
    [
        ("pyarrow.parquet.ParquetFile", "a.parquet"), ("datasets.load_from_disk", "saved"),
        ("datasets.load_dataset", "name/of-hub"),
    ],
)  # fmt: skip
def test_too_little_memory_is_no_damage(
    opener: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").touch()
    monkeypatch.setattr(opener, mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        list(read_documents(source if "/" in source else str(tmp_path / source)))
