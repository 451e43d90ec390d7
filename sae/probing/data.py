"""Files of labelled texts and the data sets of sae-probes: find and read them."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae.errors import ConfigError, DataError
from sae.files.paths import expanded, name_of
from sae.files.printable import one_line
from sae.probing.labels import class_names, is_missing, other_kind
from sae.probing.settings import ProbeConfig
from sae.text.document import kind_of_value
from sae.text.files import reason_of
from sae.text.written_lists import CELLS, is_written_list

SAE_PROBES = "sae-probes"
TEXT_COLUMNS, LABEL_COLUMNS, SPANS = ("text", "prompt"), ("label", "target"), "spans"
_MASTER = "probing_datasets_MASTER.csv.zst"
_SUFFIXES = (".csv", ".csv.zst", ".jsonl", ".parquet")

Span = tuple[int, int, str | None]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with one label each, or with labelled spans of characters.

    Attributes:
        name: name of the data set.
        texts: the texts; none is empty.
        labels: one label per text; empty if there are spans.
        spans: (first character, character after the last, label or None if missing) of each text's spans; empty if
            there are labels.
        left_out: number of rows without text or label, and of spans without label.
    """

    name: str
    texts: tuple[str, ...] = field(repr=False)
    labels: tuple[str, ...] = field(default=(), repr=False)
    spans: tuple[tuple[Span, ...], ...] = field(default=(), repr=False)
    left_out: int = 0


@dataclass(frozen=True)
class DataFile:
    """A file of labelled texts that has not been read yet.

    Attributes:
        name: name of the data set: the file's name without suffixes, as text that UTF-8 can encode.
        path: .csv, .csv.zst, .jsonl or .parquet.
    """

    name: str
    path: Path

    def sha256(self) -> str:
        """Hash of the file's bytes."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"data {str(self.path)!r}: cannot be read ({error.strerror or error})") from error

    def read(self, settings: ProbeConfig) -> LabelledTexts:
        """Read the texts and labels from the file's columns.

        Raises:
            DataError: the file cannot be read, a column is missing, or nothing is labelled.
        """
        records = list(_records(self.path, settings))
        return _labelled(self.name, str(self.path), records, settings)


def read_texts(path: Path) -> list[str]:
    """The texts of a file, in order.

    The texts of a .csv, .csv.zst, .jsonl or .parquet file are its column `text` or `prompt`. Any other file is plain
    text in UTF-8: its paragraphs, separated by empty lines, are the texts; without empty lines its lines are.

    Raises:
        DataError: the file cannot be read, or has no such column.
    """
    if path.name.endswith(_SUFFIXES):
        records = list(_records(path, ProbeConfig()))
        columns = list(dict.fromkeys(key for row in records for key in row))
        column = next((name for name in TEXT_COLUMNS if name in columns), None)
        if column is None:
            raise DataError(
                f"texts {str(path)!r}: no column 'text' or 'prompt'; name the column of the texts 'text' (it has: "
                f"{', '.join(columns) or 'none'}), or give a file of labelled texts as DATA, with text=COLUMN"
            )
        for number, record in enumerate(records, 1):
            if not isinstance(value := record.get(column), str | None):
                raise DataError(
                    f"texts {str(path)!r}, row {number}: column {column!r} holds {kind_of_value(value)}; convert it to "
                    "text"
                )
        return [record.get(column) or "" for record in records]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"texts {str(path)!r}: cannot be read as UTF-8 text ({one_line(str(error), 120)})") from error
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return paragraphs if len(paragraphs) > 1 else text.split("\n")


def find_data(sources: Sequence[str]) -> list[DataFile]:
    """The files that DATA arguments refer to, in order and without duplicates.

    Args:
        sources: files; folders of files; `sae-probes` for the 113 binary data sets of that package (Kantamneni et al.
            2025), if it is installed; or a folder that its wheel was unpacked to.

    Raises:
        DataError: a source does not exist, or a folder has no data file.
        ConfigError: the package is not installed.
    """
    return each_name_once(file for source in sources for file in _find(source))


def each_name_once(files: Iterable[DataFile]) -> list[DataFile]:
    """The files in order, without duplicates.

    Raises:
        DataError: two different files have the same data set name.
    """
    files = list(files)
    names: dict[str, Path] = {}
    for file in files:
        other = names.setdefault(file.name, file.path)
        if other.resolve() != file.path.resolve():
            raise DataError(
                f"data {str(file.path)!r}: {str(other)!r} is called {file.name!r} as well; rename one of the files"
            )
    return list({file.name: file for file in files}.values())


def _find(source: str) -> Iterator[DataFile]:
    path = expanded(source)
    if source == SAE_PROBES and not path.exists():
        path = _installed()
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise DataError(f"data {source!r}: expected a file that ends in {', '.join(_SUFFIXES)}")
        yield DataFile(_stem(path), path)
        return
    if not path.is_dir():
        raise DataError(
            f"data {source!r}: no such file or folder; give a .csv, .jsonl or .parquet file, 'sae-probes', or a folder "
            "that its wheel was unpacked to"
        )
    places = [folder / _MASTER for folder in (path, path / "data", path / "sae_probes" / "data")]
    master = next((place for place in places if place.is_file()), None)
    if master is not None:
        yield from _sae_probes_files(master)
        return
    files = sorted(file for file in path.iterdir() if file.name.endswith(_SUFFIXES))
    for file in files:
        if not file.is_file():
            raise DataError(
                f"data {str(file)!r}: not a regular file (a folder, a pipe or a link to nothing); move it away"
            )
    if not files:
        raise DataError(f"data {source!r}: the folder holds no file that ends in {', '.join(_SUFFIXES)}")
    yield from (DataFile(_stem(file), file) for file in files)


def _installed() -> Path:
    """The folder of the installed package. It is not imported, because that would import all of SAELens."""
    spec = importlib.util.find_spec("sae_probes")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "data 'sae-probes': the package is not installed; 'pip install --no-deps sae-probes==0.4.2' brings its "
            "data sets without its libraries, or unpack its wheel and give that folder"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _sae_probes_files(master: Path) -> Iterator[DataFile]:
    """The binary data sets; the list has others too, with numbers or many classes."""
    for record in _csv(master, ["Data type", "Dataset save name"]):
        if record["Data type"] == "Binary Classification":
            path = master.parent / f"{record['Dataset save name']}.zst"
            if not path.is_file():
                raise DataError(
                    f"data {str(path)!r}: {_MASTER} lists it, but it does not exist; unpack the wheel again"
                )
            yield DataFile(_stem(path), path)


def _stem(path: Path) -> str:
    suffix = next(suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix))
    return name_of(path.name.removesuffix(suffix))


def _records(path: Path, settings: ProbeConfig) -> Iterator[dict[str, Any]]:
    columns = [name for name in (settings.text, settings.label) if name is not None]
    if path.name.endswith((".csv", ".csv.zst")):
        names = [*columns, *TEXT_COLUMNS, *LABEL_COLUMNS]
        return _csv(path, names)
    return _jsonl(path) if path.suffix == ".jsonl" else _parquet(path)


def _csv(path: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows with the named columns that exist; if none does, one row with all column names and no values."""
    pyarrow = _pyarrow()
    from pyarrow import csv as arrow_csv

    try:
        with path.open("rb") as file:  # pyarrow cannot open names that are not UTF-8
            stream = pyarrow.input_stream(file, compression="zstd" if path.suffix == ".zst" else None)
            content = stream.read()
        header = next(csv.reader([content[: content.find(b"\n") + 1 or None].decode("utf-8-sig")]), [])
        present = [name for name in dict.fromkeys(names) if name in header]
        if not present:
            yield dict.fromkeys(header)
            return
        table = arrow_csv.read_csv(
            pyarrow.BufferReader(content),
            read_options=arrow_csv.ReadOptions(block_size=len(content) + 1),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=present,
                column_types=dict.fromkeys(present, pyarrow.string()),
                strings_can_be_null=False,
            ),
        )
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"data {str(path)!r}: not a complete CSV file ({' '.join(str(error).split())[:200]})"
        ) from error
    yield from table.to_pylist()


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data {str(path)!r}: cannot be read as UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"data {str(path)!r}: line {number} is not JSON ({reason_of(error)})") from error
        if not isinstance(record, dict):
            raise DataError(f"data {str(path)!r}: line {number} is not an object with a text and a label")
        yield record


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    _pyarrow()
    from pyarrow import parquet

    try:
        with path.open("rb") as file:
            yield from parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"data {str(path)!r}: not a parquet file ({' '.join(str(error).split())[:200]})") from error


def _labelled(name: str, where: str, records: list[dict[str, Any]], settings: ProbeConfig) -> LabelledTexts:
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = _column(where, "text", settings.text, TEXT_COLUMNS, columns)
    label = _column(where, "label", settings.label, (*LABEL_COLUMNS, SPANS), columns)
    for number, record in enumerate(records, 1):
        _check_kinds(where, number, text, record.get(text), label, record.get(label))
    labelled = {
        number: record
        for number, record in enumerate(records, 1)
        if (record.get(text) or "").strip() and not is_missing(record.get(label))
    }
    if not labelled:
        raise DataError(f"data {where!r}: no row has both a {text!r} and a {label!r}")
    texts = tuple(record[text].encode("utf-8", "replace").decode() for record in labelled.values())
    if 2 * sum(map(is_written_list, texts[:CELLS])) > len(texts[:CELLS]):
        raise DataError(
            f"data {where!r}: column {text!r} holds lists written as text; set text=COLUMN to another column, or "
            "convert it to text"
        )
    left_out = len(records) - len(labelled)
    labels = {number: record[label] for number, record in labelled.items()}
    if not any(isinstance(value, list) for value in labels.values()):
        return LabelledTexts(name, texts, tuple(_names(where, label, labels.items())), left_out=left_out)
    spans = {number: _spans(where, number, value) for number, value in labels.items()}
    named = [
        (number, value) for number, text_spans in spans.items() for *_, value in text_spans if not is_missing(value)
    ]
    names = iter(_names(where, label, named))
    return LabelledTexts(
        name, texts,
        spans=tuple(
            tuple((start, end, None if is_missing(value) else next(names)) for start, end, value in text_spans)
            for text_spans in spans.values()
        ),
        left_out=left_out + sum(map(len, spans.values())) - len(named),
    )  # fmt: skip


def _names(where: str, column: str, labels: Iterable[tuple[int, Any]]) -> list[str]:
    """Class names for pairs of row and label; DataError if text is mixed with numbers or booleans."""
    pairs = list(labels)
    values = [value for _, value in pairs]
    other = other_kind(values)
    if other is not None:
        raise DataError(
            f"data {where!r}, row {pairs[other][0]}: column {column!r} has the label {_shown(values[other])}, and "
            f"{_shown(values[0])} in row {pairs[0][0]}; expected text alone, or numbers, true and false: convert the "
            "column to one of these"
        )
    return class_names(values)


def _shown(label: Any) -> str:
    return f"{label!r:.40}" if isinstance(label, str) else kind_of_value(label)


def _check_kinds(where: str, row: int, text_column: str, text: Any, label_column: str, label: Any) -> None:
    """Raise DataError unless a row has text, and a label or a list of spans; either may be missing."""
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"data {where!r}, row {row}: column {text_column!r} holds {kind_of_value(text)}; expected text: set "
            "text=COLUMN to another column, or convert it to text"
        )
    if label is not None and not isinstance(label, str | int | float | list):
        raise DataError(
            f"data {where!r}, row {row}: column {label_column!r} holds {kind_of_value(label)}; expected text, a "
            "number, true or false, or a list of spans: set label=COLUMN to another column, or convert it to one of "
            "these"
        )


def _column(where: str, role: str, requested: str | None, defaults: Sequence[str], columns: Sequence[str]) -> str:
    candidates = [requested] if requested is not None else defaults
    column = next((candidate for candidate in candidates if candidate in columns), None)
    if column is None:
        missing = " or ".join(map(repr, candidates))
        raise DataError(
            f"data {where!r}: no column {missing}; set {role}=COLUMN to one of: {', '.join(columns) or 'none'}"
        )
    return column


def _spans(where: str, row: int, spans: Any) -> list[tuple[int, int, Any]]:
    try:
        if not all(label is None or isinstance(label, str | int | float) for _, _, label in spans):
            raise TypeError("a label is text, a number, true or false")
        return [(int(start), int(end), label) for start, end, label in spans]
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(
            f"data {where!r}, row {row}: spans={spans!r:.80}: expected a list of [first character, character after "
            "the last, label]"
        ) from error


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            "labelled .csv, .zst and .parquet files need pyarrow, from the package's extra: pip install 'sae[lm]'"
        ) from error
    return pyarrow
