"""A source of text in; a stream of named documents out."""

from __future__ import annotations

import ast
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae.config.progress import import_tqdm
from sae.errors import DataError
from sae.files.hub_errors import explain_hub_error, first_line
from sae.files.paths import expanded, name_of
from sae.text.census import Census
from sae.text.document import READING, Document
from sae.text.files import READABLE, as_data_errors, field_of, is_saved_dataset, read_file, read_folder
from sae.text.written_lists import without_written_lists

STANDARD_LIBRARY = "stdlib"
# Character maps are tables of numbers; topics.py is read topic by topic instead of as source.
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "__pycache__", "encodings", "cjkencodings")
_STDLIB_SHORTEST = 400
_SHOWN = 80


def read_documents(
    source: str, *, split: str = "train", subset: str | None = None, column: str = "text", streaming: bool = True,
    census: Census | None = None, revision: str | None = None, reading: int = READING,
) -> Iterator[Document]:  # fmt: skip
    """Documents of `source`, in an order that depends only on the source itself.

    Args:
        source: `stdlib`, a file of a kind in `sae.text.files`, a folder of such files, or a dataset of the Hugging Face
            hub (or a folder written by `datasets.save_to_disk`).
        split, subset: the dataset's split and configuration name; hub datasets only.
        column: the field that holds text, token ids or chats, in all but .txt and .md files.
        streaming: read a hub dataset as it downloads, instead of downloading all of it first.
        census: counts skipped entries.
        revision: git revision of a hub dataset.
        reading: version of how text is read.

    Raises:
        DataError: the source does not exist, is of an unsupported kind, holds no text, lacks the column, or the column
            holds lists written as text.
    """
    path = _place(source)
    if source == STANDARD_LIBRARY:
        return standard_library()
    if is_saved_dataset(path):
        return without_written_lists(_saved_dataset(path, split, column), column, reading)
    if path.is_dir():
        return read_folder(path, column, census, reading=reading)
    if path.is_file():
        return read_file(path, name_of(path.name), column, reading=reading)
    if path.suffix.lower() in READABLE or source.startswith((".", "/", "~")):
        raise DataError(f"data source {source!r}: no such file or folder")
    rows = _hub_dataset(source, split, subset, column, streaming, revision)
    return without_written_lists(rows, column, reading)


def check_revision(sources: Sequence[str], revision: str | None) -> None:
    """Raise DataError if `revision` is given and the sources are not a single hub data set."""
    if revision is None:
        return
    if len(sources) > 1:
        raise DataError(
            f"data.revision={revision!r} with {len(sources)} sources: a revision is of one hub data set; leave it out, "
            "or name that data set alone"
        )
    if sources[0] == STANDARD_LIBRARY or _place(sources[0]).exists():
        raise DataError(
            f"data.revision={revision!r}: data source {sources[0]!r} is not a hub data set, and only these have "
            "revisions; leave it out"
        )


def check_apart(sources: Sequence[str]) -> None:
    """Raise DataError if a source lies inside another: its text could fall on both sides of the held-out split."""
    paths = {source: _place(source) for source in sources if source != STANDARD_LIBRARY}
    places = {source: path.resolve() for source, path in paths.items() if path.exists()}
    for (source, place), (other, outer) in itertools.permutations(places.items(), 2):
        if place.is_relative_to(outer):
            raise DataError(
                f"data source {source!r}: it is {other!r} or lies inside it, so its text would be read twice; name "
                "sources that do not overlap, and give more of data.weights to those that should count more"
            )


def holdout_share(name: str, seed: int) -> float:
    """The smallest `fraction` for which the document with that name is held out, up to rounding."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") / 2**64


def is_held_out(name: str, seed: int, fraction: float) -> bool:
    """Whether the document with that name is held out for evaluation.

    A hash of seed and name decides, so the answer does not depend on other documents, their order or the machine.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _place(source: str) -> Path:
    """The path of a source, if it is a file or a folder.

    Raises:
        DataError: the system cannot access the path.
    """
    path = expanded(source)
    try:
        path.exists()
    except OSError as error:
        shown = repr(source if len(source) <= _SHOWN else f"{source[:_SHOWN]}…")
        raise DataError(
            f"data source {shown}: {error.strerror or error}; name a file, a folder or a hub data set that can be read"
        ) from error
    return path


def standard_library() -> Iterator[Document]:
    """The Python standard library: one document per source file, and one per topic of `help()`.

    Shuffled by a hash of the names, without files of equal text. About 30 MB if the library's own tests are installed,
    13 MB if a distribution leaves them out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _STDLIB_SKIPPED]
        sources = (Path(folder) / file for file in files if file.endswith(".py"))
        paths |= {path.relative_to(root).as_posix(): path for path in sources}
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


def _saved_dataset(path: Path, split: str, column: str) -> Iterator[tuple[str, Document]]:
    import_tqdm()
    import datasets

    begin = f"data source {str(path)!r}: "
    with as_data_errors(begin, lambda error: f"not a complete saved data set ({first_line(error)})"):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{begin}no split {split!r}; it has {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    loaded = loaded.with_format(None)  # the format it was saved with gives tensors, and other columns may be missing
    return _rows(loaded, str(path), column)


def _hub_dataset(
    source: str, split: str, subset: str | None, column: str, streaming: bool, revision: str | None
) -> Iterator[tuple[str, Document]]:
    import_tqdm()
    import datasets
    from datasets import packaged_modules

    if source in packaged_modules._PACKAGED_DATASETS_MODULES:  # there is no other list of them
        raise DataError(
            f"data source {source!r}: no file or folder with that name, and for `datasets` it is a file format, not a "
            "data set on the hub; name the files' folder, or a data set as OWNER/NAME"
        )
    with as_data_errors(
        f"data source {source!r}: ", lambda error: explain_hub_error(error, source, "data set", "data")
    ):
        loaded = datasets.load_dataset(source, subset, split=split, streaming=streaming, revision=revision)
    return _rows(loaded, source, column)


def _rows(rows: Any, source: str, column: str) -> Iterator[tuple[str, Document]]:
    rows = iter(rows)
    for number in itertools.count():
        where = f"{source}, row {number}"
        with as_data_errors(  # a streamed data set can fail at any row
            f"data source {source!r}: row {number} could not be read ",
            lambda error: f"({first_line(error)}); check the network, and run the same command again to continue",
        ):
            record = next(rows, None)
        if record is None:
            return
        yield where, Document(f"{number}", field_of(record, column, where, number + 1))
