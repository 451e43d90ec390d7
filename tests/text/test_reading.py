"""Files of every kind and what their columns hold, against texts written down here."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.errors import DataError
from sae.text.census import Census
from sae.text.corpus import read_documents
from sae.text.document import Chat, Content, TokenIds
from sae.text.packing import READING
from sae.text.prepared import prepared_documents

ROWS = [{"text": "One, ü × 漢字 😀.\nTwo", "n": 1}, {"text": 'He said "no", twice', "n": 2}]
TEXTS = [row["text"] for row in ROWS]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(delimiter: str) -> bytes:
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, ["text", "n"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return ("\ufeff" + out.getvalue()).encode()


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd,
}  # fmt: skip
KINDS = {
    ".jsonl": lines(ROWS),
    ".NDJSON": lines(ROWS),
    ".json": json.dumps(ROWS, indent=1).encode(),
    ".JSON": lines(ROWS),
    ".csv": as_csv(","),
    ".TSV": as_csv("\t"),
}


def contents(source: Path, column: str = "text") -> list[Content]:
    return [document.text for document in read_documents(str(source), column=column)]


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_records_of_every_kind_alone_and_in_a_folder(kind: str, packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}{packed.upper() if kind.isupper() else packed}"
    path.write_bytes(PACKERS[packed](KINDS[kind]))
    assert contents(path) == contents(tmp_path) == TEXTS


@pytest.mark.parametrize("packed", PACKERS)
def test_plain_text_compressed_and_in_capitals(packed: str, tmp_path: Path) -> None:
    path = tmp_path / f"A.TXT{packed}"
    path.write_bytes(PACKERS[packed](b"line\r\nother"))
    assert contents(path) == contents(tmp_path) == ["line\nother"]
    path.write_bytes(PACKERS[packed](b"x" * 100_000)[:-5] if packed else b"\xff")
    with pytest.raises(DataError, match=r"A\.TXT\S*': (cannot be read|not UTF-8 text)"):
        contents(path)


@pytest.mark.parametrize("kind", [".html", "", ".gz", ".parquet.gz", ".pdf"])
def test_a_file_of_another_kind_is_refused_with_what_can_be_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"page{kind}").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"not a kind of file that can be read, which are \.txt, .* as \.gz"):
        contents(tmp_path / f"page{kind}")


def test_what_a_folder_holds_besides_is_counted(tmp_path: Path) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    for name in ("a.txt", "b.pdf", "c.pdf", "LICENSE"):
        (tmp_path / name).write_text(name)
    (tmp_path / "package.json").write_text('{"name": "x"}')
    census = Census()
    assert [document.name for document in read_documents(str(tmp_path), census=census)] == ["a.txt"]
    assert (census.hidden, dict(census.other_kinds), census.without_column) == (
        2, {".pdf": 2, "no suffix": 1}, ["package.json"],
    )  # fmt: skip
    assert census.lines("x", chose_unit=True) == [
        "data source 'x': 2 hidden files and folders not read",
        "data source 'x': not read, being of other kinds: 2 of '.pdf', 1 of no suffix",
        "data source 'x': 1 file without the column not read (package.json)",
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"package.json, record 1: no column 'text'; set data.column to one of: name"):
        contents(tmp_path)
    (tmp_path / "package.json").unlink()
    with pytest.raises(DataError, match=r"holds no .txt.* file, only 2 of '.pdf', 1 of no suffix \(2 hidden ones"):
        contents(tmp_path)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (3, r"a number \(3\)"), (2.5, r"a number \(2.5\)"), (True, r"a truth value \(True\)"),
        ({"a": 1, "b": 2}, "an object with 'a', 'b'"), ([1.5, 2.0], r"a list of numbers \(1.5"),
        ([[1, 2], [3]], "a list of lists"), (["a", "b"], "a list of text"), ([1, None], "a list of int and null"),
        ([True, False], "a list of truth values"), ([1, "a"], "a list of int and str"),
        ([{"role": "user"}], "expected a message with a role and a content that is text"),
        ([{"role": "user", "content": 3}], "expected a message"), ([3, -1], "a list with -1, which is not a token id"),
        ([2**40], "which is not a token id"),
    ],
)  # fmt: skip
def test_what_is_neither_text_nor_ids_nor_a_chat_is_refused_by_row_and_column(
    value: Any, found: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"x": "fine"}, {"x": value}]))
    with pytest.raises(DataError, match=rf"a.jsonl, line 2: column 'x'.*{found}") as caught:
        contents(tmp_path / "a.jsonl", "x")
    assert "\n" not in str(caught.value)


def test_parquet_and_saved_data_sets_hold_no_bytes(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"x": [b"abc"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 0: column 'x' holds 3 bytes"):
        contents(tmp_path / "a.parquet", "x")
    datasets.Dataset.from_dict({"x": [[1, 2], [3]]}).save_to_disk(str(tmp_path / "saved"))
    ids = contents(tmp_path / "saved", "x")
    assert [one.ids.tolist() for one in ids if isinstance(one, TokenIds)] == [[1, 2], [3]]


def test_lists_in_csv_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('x\n"[1, 2, 3]"\n')
    with pytest.raises(DataError, match=r"a.csv, row 1: column 'x' holds a list written as text"):
        contents(tmp_path / "a.csv", "x")


@pytest.mark.parametrize("text", ["[1] Smith said so [2]", "[2020-01-01] [a note]", "[...]", "[-]", "[0-9]\\d [x]"])
def test_text_in_brackets_is_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'x\n"{text}"\n')
    assert contents(tmp_path / "a.csv", "x") == [text]


def test_a_chat_that_python_wrote_into_a_csv_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n\"[{'role': 'user'}]\"\n")
    with pytest.raises(DataError, match=r"a.csv, row 1: column 'x' holds a list written as text"):
        contents(tmp_path / "a.csv", "x")


def test_text_behind_a_comma_without_quotes_is_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"fine,\nso far"\nHello, world, this is lost\n')
    (tmp_path / "b.tsv").write_text("text\nHello\tworld\n")
    with pytest.raises(DataError, match=r"a.csv': line 4 has more fields than the header; put text with a comma in q"):
        contents(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"b.tsv': line 2 has more fields than the header; put text with a tab in quo"):
        contents(tmp_path / "b.tsv")


def test_a_row_that_ends_before_the_text_is_refused_and_one_that_ends_behind_it_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\nHello\n")
    assert contents(tmp_path / "a.csv") == ["Hello"]
    (tmp_path / "b.csv").write_text("n,text\n1,Hello\nworld\n")
    with pytest.raises(DataError, match=r"line 3 has fewer fields than the header, and none for 'text'; put text wi"):
        contents(tmp_path / "b.csv")


def test_rows_of_other_tables_in_a_folder_may_have_any_number_of_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.csv").write_text("x,y\n1,2,3\n")
    assert contents(tmp_path) == ["text"]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv"])
def test_damaged_xz(kind: str, tmp_path: Path) -> None:
    content = bytearray(lzma.compress(lines(ROWS * 100)))
    content[30:40] = bytes(10)
    (tmp_path / f"a{kind}.xz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.\w+\.xz': cannot be read \(Corrupt input data\)"):
        contents(tmp_path)


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson.gz"])
def test_lines_may_begin_with_a_byte_order_mark(kind: str, tmp_path: Path) -> None:
    for beginning in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
        content = beginning + lines(ROWS)
        (tmp_path / f"a{kind}").write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
        assert contents(tmp_path) == TEXTS


def test_messages_in_three_forms(tmp_path: Path) -> None:
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    forms = [
        plain,
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        [{"role": one["role"], "content": [{"type": "text", "text": one["content"]}], "name": None} for one in plain],
    ]
    (tmp_path / "a.jsonl").write_bytes(lines([{"m": form} for form in forms]))
    assert contents(tmp_path / "a.jsonl", "m") == [Chat(tuple(plain))] * 3


def test_equal_documents_are_read_once_over_files_rows_and_links(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One text.")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "copy.md").write_text("One text.")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "z.jsonl").write_bytes(
        lines([{"text": text} for text in ("One text.", "Another", "", None, "Another")])
    )
    census = Census()
    found = [(name, text) for name, text, _ in prepared_documents(DataConfig(source=str(tmp_path)), census=census)]
    assert found == [("a.txt", "One text."), ("z.jsonl:2", "Another")]
    assert (census.duplicates, census.empty) == (4, 2)


def test_equal_long_texts_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that begin alike are compared to the end."""
    monkeypatch.setattr("sae.text.files._HELD_WHOLE", 50)
    monkeypatch.setattr("sae.text.files._BYTES_AT_ONCE", 64)
    for name, end in (("a", "x"), ("b", "y"), ("c", "x")):
        (tmp_path / f"{name}.txt").write_text("word " * 100 + end)
    (tmp_path / "d.txt").symlink_to(tmp_path / "b.txt")
    census = Census()
    assert [name for name, _, _ in prepared_documents(DataConfig(source=str(tmp_path)), census=census)] == [
        "a.txt",
        "b.txt",
    ]
    assert census.duplicates == 2


def distinct(source: Path, reading: int = READING) -> tuple[list[str], int]:
    """Names of the documents that are read, and how many are equal to one of them."""
    census = Census()
    config = DataConfig(source=str(source), holdout_by="section", section_characters=10**9)
    found = prepared_documents(config, census=census, reading=reading)
    return list(dict.fromkeys(name.partition("#")[0] for name, _, _ in found)), census.duplicates


def test_texts_that_differ_in_line_ends_marks_and_space_around_them_are_equal(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"One\n\ntext.\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfOne\r\n\r\ntext.\r\n")
    (tmp_path / "c.jsonl").write_bytes(lines([{"text": " One\r\rtext."}, {"text": "\ufeffOne\n\ntext."}]))
    (tmp_path / "d.txt").write_bytes(b"One\ntext.\n")
    assert distinct(tmp_path) == (["a.txt", "d.txt"], 3)
    assert distinct(tmp_path, reading=1) == (["a.txt", "b.txt", "c.jsonl:1", "c.jsonl:2", "d.txt"], 0)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Nor does it move the place of a wrong byte."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne")
    assert contents(tmp_path / "a.txt") == ["One"]
    assert [document.text for document in read_documents(str(tmp_path), reading=1)] == ["\ufeffOne"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne\xff")
    with pytest.raises(DataError, match=r"not UTF-8 text \(invalid start byte at byte 6\)"):
        contents(tmp_path / "a.txt")


def test_equal_long_texts_of_all_kinds_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces or as a row, with other line ends, a mark, or more space at the ends."""
    monkeypatch.setattr("sae.text.files._HELD_WHOLE", 300)
    monkeypatch.setattr("sae.text.files._BYTES_AT_ONCE", 64)
    monkeypatch.setattr("sae.text.digests._LONG", 200)
    text = "\n".join(f"line {number}  \n" for number in range(100))
    (tmp_path / "a.txt").write_text(text + "end")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf\n" + text.replace("\n", "\r\n").encode() + b"end" + b"\r\n" * 90)
    (tmp_path / "c.jsonl").write_bytes(lines([{"text": text + "end\n"}, {"text": text + "other end"}]))
    (tmp_path / "d.txt").write_text(" " * 400 + text + "end")
    (tmp_path / "e.txt").write_text(text + "other end\n")
    (tmp_path / "f.txt").write_text(text.replace("  \n", "\n") + "end")
    (tmp_path / "g.txt").write_text(" " * 400 + "short")
    (tmp_path / "h.jsonl").write_bytes(lines([{"text": "short"}]))
    assert distinct(tmp_path) == (["a.txt", "c.jsonl:2", "f.txt", "g.txt"], 5)
    assert distinct(tmp_path, reading=1)[1] == 0


@pytest.mark.parametrize("shape", ["line", "folder", "jsonl", "lines"])
def test_one_document_is_divided_by_sections_and_says_so(shape: str, tmp_path: Path) -> None:
    words = " ".join(f"word{number}" for number in range(80_000))  # 640 kB
    source = tmp_path / {"line": "a.txt", "folder": "books", "jsonl": "a.jsonl", "lines": "b.txt"}[shape]
    if shape == "folder":
        source.mkdir()
        (source / "book.txt").write_text(words)
    else:
        source.write_bytes(lines([{"text": words}]) if shape == "jsonl" else words.replace("9 ", "9\n").encode())
    census = Census()
    found = list(prepared_documents(DataConfig(source=str(source)), census=census))
    assert {split for _, _, split in found} == {TRAIN, HELD_OUT}
    assert len({name for name, _, _ in found}) == len(found) > 30
    assert "".join(str(text) for _, text, _ in found) == (words if shape in ("folder", "jsonl") else source.read_text())
    assert "it is one document: its sections are divided" in census.lines("x", chose_unit=False)[0]
    with pytest.raises(
        DataError, match=r"it holds one document, and a held-out split needs at least two: set data.holdo"
    ):
        list(prepared_documents(DataConfig(source=str(source), holdout_by="document")))


def test_sections_of_a_folder_are_documents_if_asked_for(text_folder: Path) -> None:
    config = DataConfig(source=str(text_folder), section_characters=200, holdout_by="section", holdout_fraction=0.3)
    sides: dict[str, set[str]] = {}
    for name, _, split in prepared_documents(config):
        sides.setdefault(name.partition("#")[0], set()).add(split)
    assert sum(len(side) == 2 for side in sides.values()) > 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"text": ', "not JSON"), ('[{"text": "a"} {"text": "b"}]', "not JSON .expected ',' or ']'"),
        ('[{"text": "a"},]', "not JSON .a comma before the end"), ('[{"text": "a"}] x', "not JSON .more after the end"),
        ("[" * 100_000, "not JSON"), ('{"text": ' + "9" * 5000 + "}", "not JSON"), ("5", "record 1: no column 'text'"),
    ],
)  # fmt: skip
def test_damaged_json(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        contents(tmp_path / "a.json")


def test_a_long_list_is_read_record_by_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.text.files._BYTES_AT_ONCE", 7)
    (tmp_path / "a.json").write_text(json.dumps(ROWS * 3, ensure_ascii=False), encoding="utf-8")
    assert contents(tmp_path / "a.json") == TEXTS * 3
