"""Where text comes from: a source in, a stream of named documents out."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import DataError

STANDARD_LIBRARY = "stdlib"
SINGLE_TEXT_SUFFIXES = (".txt", ".md")
TEXT_SUFFIXES = (*SINGLE_TEXT_SUFFIXES, ".jsonl", ".parquet")
# Character maps are tables of numbers; topics.py is read topic by topic instead of as source.
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "__pycache__", "encodings", "cjkencodings")
_STDLIB_SHORTEST = 400


@dataclass(frozen=True)
class Document:
    """A text and the name it is known by: the name decides on which side of the held-out split it falls."""

    name: str
    text: str


def read_documents(
    source: str, *, split: str = "train", subset: str | None = None, column: str = "text", streaming: bool = True
) -> Iterator[Document]:
    """Documents of `source`, in an order that depends on nothing but the source itself.

    Args:
        source: `stdlib`, a .txt/.md/.jsonl/.parquet file, a folder of such files, or a dataset of the Hugging Face hub
            (or a folder written by `datasets.save_to_disk`).
        split, subset: the dataset's split and configuration name; hub datasets only.
        column: the field that holds the text, in .jsonl, .parquet and hub datasets.
        streaming: read a hub dataset as it downloads, instead of downloading all of it first.

    Raises:
        DataError: the source does not exist, holds no text, or lacks the column.
    """
    path = Path(source).expanduser()
    if source == STANDARD_LIBRARY:
        return standard_library()
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved_dataset(path, split, column)
    if path.is_dir():
        return _folder(path, column)
    if path.is_file():
        return _file(path, path.name, column)
    if path.suffix in TEXT_SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(f"data source {source!r}: no such file or folder")
    return _hub_dataset(source, split, subset, column, streaming)


def check_apart(sources: Sequence[str]) -> None:
    """Raise DataError where a source lies in another: its text could fall on both sides of the held-out split."""
    paths = {source: Path(source).expanduser() for source in sources if source != STANDARD_LIBRARY}
    places = {source: path.resolve() for source, path in paths.items() if path.exists()}
    for source, place in places.items():
        for other, outer in places.items():
            if other != source and place.is_relative_to(outer):
                raise DataError(
                    f"data source {source!r}: it is {other!r} or lies inside it, so its text would be read twice; name "
                    "what lies side by side, and give more of data.weights to what shall count more"
                )


def is_held_out(name: str, seed: int, fraction: float) -> bool:
    """Whether the document of that name is set aside for evaluation.

    A hash of seed and name decides, so the answer survives new documents, other orders and other machines.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def standard_library() -> Iterator[Document]:
    """The Python standard library: a document a source file, and one a topic of `help()`.

    Shuffled by a hash of the names, without files of equal text. About 30 MB where the library's own tests are
    installed, 13 MB where a distribution leaves them out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder) / file
                paths[path.relative_to(root).as_posix()] = path
    topics_path = paths.pop("pydoc_data/topics.py", None)
    topics = _help_topics(topics_path) if topics_path else {}
    seen = set()
    for name in sorted([*paths, *topics], key=lambda name: hashlib.sha256(name.encode()).digest()):
        text = topics[name] if name in topics else _read_source(paths[name])
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) >= _STDLIB_SHORTEST and digest not in seen:
            seen.add(digest)
            yield Document(name, text)


def _help_topics(path: Path) -> dict[str, str]:
    """The topics of `help()`; the file is one dictionary literal and is parsed, not run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            return {f"topics/{name}": text for name, text in ast.literal_eval(node.value).items()}
    return {}


def _read_source(path: Path) -> str:
    """Source text, or nothing for the library's deliberately undecodable test files."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _folder(path: Path, column: str) -> Iterator[Document]:
    files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"data source {str(path)!r}: the folder holds no {', '.join(TEXT_SUFFIXES)} file")
    return (document for file in files for document in _file(file, file.relative_to(path).as_posix(), column))


def _file(path: Path, name: str, column: str) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        return _jsonl(path, name, column)
    if path.suffix == ".parquet":
        return _parquet(path, name, column)
    return _text(path, name)


def _text(path: Path, name: str) -> Iterator[Document]:
    try:
        yield Document(name, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(_unreadable(path, error)) from error


def _jsonl(path: Path, name: str, column: str) -> Iterator[Document]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8"))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else error.reason
                    raise DataError(f"data source {str(path)!r}: line {number} is not JSON ({reason})") from error
                yield Document(f"{name}:{number}", _field(record, column, f"{path}, line {number}"))
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error


def _parquet(path: Path, name: str, column: str) -> Iterator[Document]:
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except Exception as error:
        raise DataError(f"data source {str(path)!r}: not a parquet file ({error})") from error
    if column not in table.schema_arrow.names:
        raise DataError(_no_column(str(path), column, table.schema_arrow.names))
    row = 0
    for batch in table.iter_batches(columns=[column], batch_size=1024):
        for text in batch.column(0).to_pylist():
            yield Document(f"{name}:{row}", str(text or ""))
            row += 1


def _saved_dataset(path: Path, split: str, column: str) -> Iterator[Document]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"data source {str(path)!r}: not a whole saved data set ({_first_line(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"data source {str(path)!r}: no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return _rows(loaded, str(path), column)


def _hub_dataset(source: str, split: str, subset: str | None, column: str, streaming: bool) -> Iterator[Document]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, subset, split=split, streaming=streaming)
    except Exception as error:
        raise DataError(
            f"data source {source!r}: neither a file nor a folder here, and the hub did not give it "
            f"({_first_line(error)}). Check the name and the network, or give a local file, a folder, or 'stdlib'"
        ) from error
    return _rows(loaded, source, column)


def _rows(rows: Any, source: str, column: str) -> Iterator[Document]:
    rows, number = iter(rows), 0
    while True:
        try:
            record = next(rows)
        except StopIteration:
            return
        except Exception as error:  # a streamed data set can fail at any row
            raise DataError(
                f"data source {source!r}: row {number} could not be read ({_first_line(error)}); check the network"
            ) from error
        yield Document(f"{number}", _field(record, column, f"{source}, row {number}"))
        number += 1


def _field(record: Any, column: str, where: str) -> str:
    if not isinstance(record, dict) or column not in record:
        raise DataError(_no_column(where, column, list(record) if isinstance(record, dict) else []))
    text = str(record[column] or "")
    return text.encode("utf-8", "replace").decode()  # JSON may escape lone surrogates, which no tokenizer takes


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"data source {str(path)!r}: not UTF-8 text ({error.reason} at byte {error.start})"
    return f"data source {str(path)!r}: cannot be read ({error.strerror or error})"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _no_column(where: str, column: str, names: list[str]) -> str:
    return f"data source {where}: no column {column!r}; set data.column to one of: {', '.join(names) or 'none'}"
