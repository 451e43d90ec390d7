"""Files and folders in, documents out: .txt, .md, .jsonl, .json, .csv, .tsv and .parquet, plain or compressed."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sae.errors import DataError
from sae.files.paths import name_of
from sae.text.binary import open_binary
from sae.text.census import Census, irregular_in_words, kinds_in_words
from sae.text.csv_records import csv_records
from sae.text.document import READING, Document, LongText, read_value
from sae.text.json_records import LongRecordError, json_records, key_there_twice, object_of
from sae.text.limits import most_in_record, there_twice, too_long
from sae.text.own_files import own_names
from sae.text.sections import joined
from sae.text.written_lists import without_written_lists

try:
    from lzma import LZMAError
except ImportError:  # a Python built without lzma reads no .xz
    LZMAError = EOFError

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
READABLE = (*TEXT_SUFFIXES, *RECORD_SUFFIXES, ".parquet")
READABLE_IN_WORDS = f"{', '.join(READABLE)}, and all but .parquet compressed as {', '.join(COMPRESSIONS)} too"
_MAY_BE_OTHER_DATA = (".json", ".csv", ".tsv")
_LINKED, _CLOSED = "link to a folder", "folder that cannot be opened"
_HELD_WHOLE = 4_000_000
_BYTES_AT_ONCE = 1 << 20


def kind_of(path: Path) -> tuple[str, str]:
    """The suffix that decides how a file is read, and that of its compression, in lower case; "" for none."""
    name = path.name.lower()
    packed = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(packed)).suffix
    readable = suffix in READABLE and not (packed and suffix == ".parquet")
    return (suffix, packed) if readable else ("", packed)


def is_saved_dataset(path: Path) -> bool:
    """Whether a path is a folder written by `datasets.save_to_disk`."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def list_folder(folder: Path, census: Census | None = None, *, reading: int = READING) -> list[Path]:
    """Files of a folder and its subfolders that can be read, in the order of their paths.

    Hidden files and folders, files that this toolkit wrote, links to folders, and entries that are not regular files
    are left out and counted.

    Raises:
        DataError: no file can be read.
    """
    census = census or Census()
    files, kinds = [], Counter[str]()
    for place, subfolders, names in os.walk(folder, onerror=lambda _: census.irregular.update([_CLOSED])):
        own = own_names(Path(place), subfolders, names) if reading >= 3 else set()
        census.own += len(own)
        hidden = [name for name in (*subfolders, *names) if name.startswith(".") and name not in own]
        census.hidden += len(hidden)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        census.irregular.update(_LINKED for name in subfolders if (Path(place) / name).is_symlink())
        for path in (Path(place) / name for name in names if not name.startswith(".") and name not in own):
            if not path.is_file():
                census.irregular.update([_irregular(path)])
            elif kind_of(path)[0]:
                files.append(path)
            else:
                kinds["".join(path.suffixes[-2:] if kind_of(path)[1] else path.suffixes[-1:]) or "no suffix"] += 1
    census.other_kinds.update(kinds)
    if not files:
        raise DataError(_nothing_there(folder, kinds, census))
    return sorted(files)


def _irregular(path: Path) -> str:
    """The kind of an entry that is not a regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "link to nothing" if path.is_symlink() else "file that cannot be opened"
    kinds = ((stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket"))
    return next((name for is_kind, name in kinds if is_kind(mode)), "device")


def _nothing_there(folder: Path, kinds: Counter[str], census: Census) -> str:
    own = f"{census.own} written by sae" if census.own else ""
    others = [part for part in (kinds_in_words(kinds), own, irregular_in_words(census.irregular)) if part]
    listed = f", only {', '.join(others)}" if others else ""
    hidden = f" ({census.hidden} hidden ones are not read)" if census.hidden else ""
    linked = "; name a linked folder itself" if census.irregular[_LINKED] else ""
    return (
        f"data source {str(folder)!r}: the folder holds no {', '.join(READABLE)} file{listed}{hidden}; compressed "
        f"as {', '.join(COMPRESSIONS)} they are read too{linked}"
    )


def read_folder(
    folder: Path, column: str, census: Census | None = None, *, reading: int = READING
) -> Iterator[Document]:
    """Documents of a folder's files, named by their paths in it.

    A .json, .csv or .tsv file without the column is left out, unless there is nothing else: such files often serve
    other purposes.

    Raises:
        DataError: no file can be read, or one is damaged.
    """
    census = census or Census()
    return _documents_of(list_folder(folder, census, reading=reading), folder, column, census, reading)


def _documents_of(files: list[Path], folder: Path, column: str, census: Census, reading: int) -> Iterator[Document]:
    unfit: MissingColumnError | None = None
    for file in files:
        name = name_of(file.relative_to(folder))
        try:
            yield from read_file(file, name, column, reading=reading)
        except MissingColumnError as error:
            if error.row > 1 or kind_of(file)[0] not in _MAY_BE_OTHER_DATA:
                raise
            unfit = unfit or error
            census.without_column.append(name)
    if unfit is not None and len(census.without_column) == len(files):
        raise unfit


def read_file(path: Path, name: str, column: str, *, reading: int = READING) -> Iterator[Document]:
    """Documents of a file.

    Args:
        path: the file.
        name: prefix of its documents' names.
        column: the field to read, in all but .txt and .md files.
        reading: version of how text is read.

    Raises:
        DataError: the file is of an unsupported kind, damaged, lacks the column, or the column holds lists as text.
    """
    kind = kind_of(path)[0]
    if not kind:
        raise DataError(
            f"data source {str(path)!r}: not a kind of file that can be read, which are {READABLE_IN_WORDS}"
        )
    if kind in TEXT_SUFFIXES:
        return _text(path, name, reading)
    read = _parquet if kind == ".parquet" else _records
    return without_written_lists(read(path, name, column, reading), column, reading)


class MissingColumnError(DataError):
    """A record lacks the column. `row` is its number in the file, from 1."""

    def __init__(self, where: str, column: str, names: list[str], row: int) -> None:
        listed = ", ".join(names) or "none"
        super().__init__(f"data source {where}: no column {column!r}; set data.column to one of: {listed}")
        self.row = row


def field_of(record: Any, column: str, where: str, row: int) -> Any:
    """The content of a record's column.

    Raises:
        DataError: the record lacks the column, has it twice, or holds something other than text, token ids or a chat.
    """
    if not isinstance(record, dict) or column not in record:
        raise MissingColumnError(where, column, list(map(str, record)) if isinstance(record, dict) else [], row)
    if (twice := key_there_twice(record, column)) is not None:
        raise DataError(there_twice(where, "key", twice))
    return read_value(record[column], column, where)


def decoded(path: Path, *, reading: int = READING) -> Iterator[str]:
    """A file's text in pieces of about a million characters, with line ends as '\\n' and without byte order mark.

    Raises:
        DataError: the file cannot be read, or is not UTF-8; the message names the byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    done, mark = 0, "" if reading < 2 else "\ufeff"
    with _opened(path, reading) as content:
        while True:
            data = content.read(_BYTES_AT_ONCE)
            waiting = len(decoder.getstate()[0])
            try:
                text = lines.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(path, error, done - waiting)) from error
            done += len(data)
            if text:
                yield text.removeprefix(mark)
                mark = ""
            if not data:
                return


@contextlib.contextmanager
def _opened(path: Path, reading: int) -> Iterator[io.BufferedIOBase]:
    """A file's bytes, decompressed; errors in the body that mean a damaged file become DataErrors."""
    try:
        with open_binary(path, kind_of(path)[1], lenient=reading < 4) as content:
            yield content
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, error)) from error
    except (OSError, EOFError, zlib.error, LZMAError) as error:
        strerror = error.strerror if isinstance(error, OSError) else None
        reason = strerror or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data source {str(path)!r}: cannot be read ({reason})") from error


def _not_utf8(path: Path, error: UnicodeDecodeError, before: int = 0) -> str:
    return f"data source {str(path)!r}: not UTF-8 text ({error.reason} at byte {before + error.start})"


def _text(path: Path, name: str, reading: int) -> Iterator[Document]:
    beginning = joined(decoded(path, reading=reading), _HELD_WHOLE + 1)
    if len(beginning) <= _HELD_WHOLE:
        yield Document(name, beginning)
    else:
        state, again = path.stat(), functools.partial(decoded, path, reading=reading)
        yield Document(name, LongText(again, (state.st_dev, state.st_ino), beginning))


def _records(path: Path, name: str, column: str, reading: int) -> Iterator[tuple[str, Document]]:
    read, place = _READERS[kind_of(path)[0]]
    for row, (number, record) in enumerate(read(path, column, reading), 1):
        where = f"{path}, {place} {number}"
        yield where, Document(f"{name}:{number}", field_of(record, column, where, row))


def _jsonl(path: Path, _: str, reading: int) -> Iterator[tuple[int, Any]]:
    most, parse = most_in_record(reading), json.JSONDecoder(object_pairs_hook=_made_by(reading)).decode
    with _opened(path, reading) as content:
        lines = iter(functools.partial(content.readline, most + 2), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > most and len(line.rstrip(b"\r\n")) > most:
                raise DataError(too_long(path, f"line {number}", "bytes"))
            record = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not record.strip():
                continue
            try:
                yield number, parse(record.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"data source {str(path)!r}: line {number} is not JSON ({reason_of(error)})") from error


def _made_by(reading: int) -> Callable[[list[tuple[str, Any]]], dict[str, Any]] | None:
    """Hook that makes an object from its keys and values; older versions took the last value of each key."""
    return object_of if reading >= 4 else None


def _json(path: Path, _: str, reading: int) -> Iterator[tuple[int, Any]]:
    """Records of a list, of one object, or of lines with an object each: .json files hold any of these."""
    number = 0
    try:
        pieces = decoded(path, reading=reading)
        for number, record in enumerate(json_records(pieces, most_in_record(reading), _made_by(reading)), 1):
            yield number, record
    except LongRecordError as error:
        raise DataError(too_long(path, f"record {number + 1}", "characters")) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data source {str(path)!r}: not JSON ({reason_of(error)})") from error


def _csv(path: Path, column: str, reading: int) -> Iterator[tuple[int, Any]]:
    delimiter = "\t" if kind_of(path)[0] == ".tsv" else ","
    with (
        _opened(path, reading) as binary,
        io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as content,  # type: ignore[arg-type]
    ):
        yield from csv_records(content, path, column, delimiter, reading=reading)


_READERS = {
    ".csv": (_csv, "row"),
    ".tsv": (_csv, "row"),
    ".json": (_json, "record"),
    ".jsonl": (_jsonl, "line"),
    ".ndjson": (_jsonl, "line"),
}
"""What reads the numbered records of a file, and what a record is called, by suffix."""


def _parquet(path: Path, name: str, column: str, reading: int) -> Iterator[tuple[str, Document]]:
    from pyarrow import parquet

    with as_data_errors(f"data source {str(path)!r}: ", lambda error: f"not a parquet file ({reason_of(error)})"):
        table = parquet.ParquetFile(path)
    if column not in table.schema_arrow.names:
        raise MissingColumnError(str(path), column, table.schema_arrow.names, 1)
    if table.schema_arrow.names.count(column) > 1 and reading >= 4:
        raise DataError(there_twice(str(path), "column", column))
    row = 0
    try:
        for batch in table.iter_batches(columns=[column], batch_size=1024):
            for value in batch.column(0):
                where = f"{path}, row {row}"
                yield where, Document(f"{name}:{row}", read_value(value.as_py(), column, where))
                row += 1
    except (OSError, ValueError) as error:
        raise DataError(f"data source {str(path)!r}: row {row} could not be read ({reason_of(error)})") from error


@contextlib.contextmanager
def as_data_errors(begin: str, explain: Callable[[Exception], str]) -> Iterator[None]:
    """Context in which a library reads a source: its errors become DataErrors, except for too little memory.

    Args:
        begin: beginning of the message.
        explain: gives the rest.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(begin + explain(error)) from error


def reason_of(error: Exception) -> str:
    """A parser's error message as one short line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    reason = error.msg if isinstance(error, json.JSONDecodeError) else getattr(error, "reason", None)
    return str(reason or " ".join(str(error).split()) or type(error).__name__)[:200]
