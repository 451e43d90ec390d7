"""A result kept in a folder: a JSON index that tells what the result is of, written last, and files next to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sae.files.formats import Format, as_read_back
from sae.files.reading import read_object
from sae.files.writing import delete, stands, write_chunks, write_json

NO_FILES: Mapping[str, bytes] = MappingProxyType({})
_NEWER = "update the package, or move the file elsewhere to have the result made anew"


@dataclass(frozen=True)
class KeptResult:
    """A kind of result that is kept in a folder.

    Attributes:
        format: at the head of the index; None: the index has no head.
        index: name of the index, a JSON file.
        beside: names of the files without which a stored result counts as missing.
        of_version: results of another version of the package are made anew, since it might compute them differently.
        grows: a stored result is continued, so its index is replaced, not deleted first.
        outdated: versions of the format whose results are made anew with a warning, and the reason.
    """

    format: Format | None
    index: str
    beside: tuple[str, ...] = ()
    of_version: bool = True
    grows: bool = False
    outdated: Mapping[int, str] = field(default_factory=dict)

    def headed(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content of an index, after format and version."""
        if self.format is None:
            return dict(content)
        return {**(self.format.result_head() if self.of_version else self.format.head()), **content}

    def write(
        self, folder: Path, content: Mapping[str, Any], files: Mapping[str, bytes | Iterable[bytes]] = NO_FILES
    ) -> list[Path]:
        """Write the files, and the index last: if it exists, so does the rest.

        An older index is deleted first, so that a kill in between leaves no result, unless results grow.

        Args:
            folder: where to write.
            content: of the index; the head is added.
            files: contents by name, each as a whole or in pieces.

        Returns:
            The files, the index first.

        Raises:
            CacheError: the folder cannot be written.
        """
        index = folder / self.index
        if not self.grows:
            delete(index)
        for name, parts in files.items():
            write_chunks(folder / name, [parts] if isinstance(parts, bytes) else parts)
        write_json(index, self.headed(content))
        return [index, *(folder / name for name in files)]

    def stands(self, folder: Path) -> bool:
        """Whether the index and the files without which it is incomplete are there."""
        return all(stands(folder / name) for name in (self.index, *self.beside))

    def read(self, folder: Path, place: str, *, way_out: str = "", oldest: int = 0) -> dict[str, Any]:
        """The index, whatever the result is of.

        Args:
            folder: where the result was written.
            place: beginning of messages, such as `features 'folder'`.
            way_out: end of messages; empty: updating the package is the only one.
            oldest: the oldest version of the format that is read.

        Raises:
            DamagedError: the index is damaged.
            FormatError: it has another format, or a version that cannot be read.
        """
        record = read_object(folder / self.index)
        if self.format:
            self.format.check(record, place, self.index, way_out=way_out, oldest=oldest)
        return record

    def find(self, folder: Path, **expected: Any) -> dict[str, Any] | None:
        """The index, if the stored result is the one that is asked for.

        Args:
            folder: where the result was written.
            expected: everything that determines the result, by the names that it has in the index.

        Returns:
            None if a file is missing, or if anything differs, including the format and the versions.

        Raises:
            DamagedError: the index is damaged.
            FormatError: it has a version that is newer than this package knows; it is not replaced.
        """
        if not self.stands(folder):
            return None
        record = read_object(folder / self.index)
        stored_version = self.format.version_of(record) if self.format else None
        if self.format and type(stored_version) is int and stored_version > self.format.version:
            self.format.check(record, repr(str(folder / self.index)), way_out=_NEWER)
        if isinstance(stored_version, int) and (reason := self.outdated.get(stored_version)):
            warnings.warn(f"{str(folder / self.index)!r}: {reason}", stacklevel=3)
        wanted = as_read_back(self.headed(expected))
        return record if all(record.get(key) == value for key, value in wanted.items()) else None
