"""Labels that a user gives features: a JSON or CSV file in, the text of each labelled feature out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sae.errors import FormatError
from sae.files.printable import one_line
from sae.files.writing import stands

NAMES = ("labels.json", "labels.csv")
_HEAD = ["feature", "label"]
_HOW = 'labels.json is {"123": "names of cities"}; labels.csv has the columns feature and label'


def find_labels(store: Path) -> Path | None:
    """The file of labels of a feature store: in its folder, or in the run folder that holds it as `features/`.

    Raises:
        FormatError: there are several.
    """
    folders = (store, store.parent) if store.absolute().name == "features" else (store,)
    found = [folder / name for folder in folders for name in NAMES if stands(folder / name)]
    if len(found) > 1:
        raise FormatError(f"labels {str(found[0])!r} and {str(found[1])!r}: keep one of these files")
    return found[0] if found else None


def read_labels(path: Path, features: int) -> dict[int, str]:
    """Labels by feature, without empty ones.

    Args:
        path: a .json file, an object with feature numbers as keys; or a .csv file with the columns `feature` and
            `label`.
        features: number of features of the dictionary.

    Raises:
        FormatError: the file cannot be read, or an entry is not a feature with a text; none of the labels are used.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # line ends within a quoted label stay
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"labels {str(path)!r}: cannot be read as UTF-8 ({error})") from error
    entries = _of_json(path, text) if path.suffix == ".json" else _of_csv(path, text)
    labels: dict[int, str] = {}
    for where, key, label in entries:
        if not isinstance(label, str):
            raise FormatError(f"labels {str(path)!r}, {where}: {label!r:.40} is not a text; {_HOW}")
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < features):
            raise FormatError(
                f"labels {str(path)!r}, {where}: {one_line(key, 40)!r} is not a feature; the store has 0 to "
                f"{features - 1}"
            )
        if int(key) in labels:
            raise FormatError(f"labels {str(path)!r}, {where}: feature {int(key)} has a label already; keep one")
        valid = label.encode("utf-8", "replace").decode()  # JSON may escape lone surrogates, which no file can hold
        labels[int(key)] = " ".join(valid.split())
    return {feature: label for feature, label in labels.items() if label}


def _of_json(path: Path, text: str) -> Iterable[tuple[str, str, Any]]:
    try:
        pairs = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"labels {str(path)!r}: not JSON ({one_line(str(error), 100)}); {_HOW}") from error
    if not isinstance(pairs, tuple):  # an object, not a list
        raise FormatError(f"labels {str(path)!r}: not an object; {_HOW}")
    return [(f"entry {number}", key, label) for number, (key, label) in enumerate(pairs, 1)]


def _of_csv(path: Path, text: str) -> Iterable[tuple[str, str, Any]]:
    rows = csv.reader(io.StringIO(text, newline=""))
    try:
        lines = [(rows.line_num, row) for row in rows if row]
    except csv.Error as error:
        raise FormatError(f"labels {str(path)!r}, line {rows.line_num}: {error}; {_HOW}") from error
    if not lines or [name.strip() for name in lines[0][1]] != _HEAD:
        raise FormatError(f"labels {str(path)!r}: no line 'feature,label' at its beginning; {_HOW}")
    for line, row in lines[1:]:
        if len(row) != len(_HEAD):
            raise FormatError(
                f"labels {str(path)!r}, line {line}: {len(row)} values, expected 2; put a label with commas in quotes"
            )
        yield f"line {line}", row[0].strip(), row[1]
