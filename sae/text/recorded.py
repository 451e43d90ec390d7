"""The tokenizer that a data set records for its token ids, compared with the model's."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from sae.errors import DataError
from sae.files.paths import expanded

_NAMES = ("tokenizer_name", "tokenizer", "tokenizer_name_or_path")
_RECORDS = ("sae_lens.json", "dataset_info.json")
_MOST_BYTES = 64 << 20


def check_recorded_tokenizer(source: str, tokenizer: Any, accepted: str | None) -> None:
    """Raise DataError if a source records another tokenizer for its token ids.

    A record is `sae_lens.json` next to the data or inside the folder, the metadata of a Parquet file or saved data set
    (`tokenizer_name`), or a `tokenizer.json` there, whose vocabulary is compared.

    Args:
        source: a file or a folder; anything else records nothing.
        tokenizer: the model's.
        accepted: name of a recorded tokenizer that is the model's own under another name.
    """
    path = expanded(source)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        return
    name = _recorded_name(path, folder)
    own = _last_part(str(getattr(tokenizer, "name_or_path", "")))
    if name is not None and name != accepted and _last_part(name) != own:
        raise DataError(
            f"data source {source!r}: its token ids are of the tokenizer {name!r}, the model's is {own!r}: use the "
            f"text, or ids of the model's own; if the two are the same tokenizer, set data.tokenizer={name}"
        )
    vocabulary = _vocabulary(folder / "tokenizer.json")
    if vocabulary is not None and vocabulary != tokenizer.get_vocab() and accepted is None:
        raise DataError(
            f"data source {source!r}: the tokenizer.json next to its token ids has another vocabulary than the model's "
            "tokenizer: use the text, or ids of the model's own; if it has nothing to do with them, move it away"
        )


def _recorded_name(path: Path, folder: Path) -> str | None:
    for record in (folder / name for name in _RECORDS):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if not record.is_file() or record.stat().st_size > _MOST_BYTES:
                continue  # such as a pipe, which would block
            name = _name_in(json.loads(record.read_text(encoding="utf-8")))
            if name is not None:
                return name
    files = sorted(file for file in folder.rglob("*.parquet") if file.is_file())[:1] if path.is_dir() else [path]
    for file in (file for file in files if file.suffix.lower() == ".parquet"):
        from pyarrow import parquet

        with contextlib.suppress(OSError, ValueError):
            metadata = parquet.read_schema(file).metadata or {}
            return _name_in(
                {key.decode(errors="replace"): value.decode(errors="replace") for key, value in metadata.items()}
            )
    return None


def _name_in(record: Any) -> str | None:
    if not isinstance(record, dict):
        return None
    return next((record[name] for name in _NAMES if isinstance(record.get(name), str) and record[name]), None)


def _vocabulary(path: Path) -> dict[str, int] | None:
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path)).get_vocab() if path.is_file() else None
    except Exception:  # despite its name not a tokenizer's file
        return None


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]
