"""A local source in; a hash of its files out, which shows whether the text has changed."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from sae.files.paths import expanded
from sae.text.document import READING
from sae.text.files import is_saved_dataset, list_folder

_HASHED_WHOLE = 256 << 20
_PIECE = 1 << 16


def source_fingerprint(source: str, *, reading: int = READING) -> str | None:
    """A hash of the names, sizes and contents of a file's or folder's texts; None if the source is neither.

    Names are relative to the folder, so its location does not matter. If the total exceeds 256 MiB, three pieces of
    each file are hashed instead of all of it. `reading`, the version of how text is read, decides which files of a
    folder are texts.
    """
    path = expanded(source)
    if path.is_file():
        folder, files = path.parent, [path]
    elif is_saved_dataset(path):
        folder, files = path, sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_dir():
        folder, files = path, list_folder(path, reading=reading)
    else:
        return None
    names = (file.relative_to(folder).as_posix() for file in files)
    stats = ((stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in map(Path.stat, files))
    return _hash(tuple(files), tuple(names), tuple(stats))


@functools.lru_cache(maxsize=16)
def _hash(files: tuple[Path, ...], names: tuple[str, ...], stats: tuple[tuple[int, int, int], ...]) -> str:
    """The hash, cached as long as `stats` stay the same."""
    digest = hashlib.sha256()
    hash_all = sum(size for size, _, _ in stats) <= _HASHED_WHOLE
    for file, name, (size, _, _) in zip(files, names, stats, strict=True):
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as content:
            if hash_all or size <= 3 * _PIECE:
                while data := content.read(1 << 20):
                    digest.update(data)
            else:
                for start in (0, (size - _PIECE) // 2, size - _PIECE):
                    content.seek(start)
                    digest.update(content.read(_PIECE))
    return digest.hexdigest()[:32]
