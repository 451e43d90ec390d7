"""The head of a file that the toolkit wrote: its format, the format's version, and the package's version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae.errors import FormatError, SaeError
from sae.files import version

_NAME, _VERSION, _PACKAGE = "format", "format_version", "sae_version"
HEAD = (_NAME, _VERSION)


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: stands at the head of every such file.
        version: the version that is written, and the newest that can be read.
    """

    name: str
    version: int

    def head(self, version: int | None = None) -> dict[str, Any]:
        """Format and version, for files that any version of the package may read.

        Args:
            version: an older one, for a file that has nothing new; None: the newest.
        """
        return {_NAME: self.name, _VERSION: self.version if version is None else version}

    def result_head(self) -> dict[str, Any]:
        """As `head`, with the package's version: for results, which another version might compute differently."""
        return {**self.head(), _PACKAGE: version.__version__}

    def version_of(self, record: Mapping[str, Any]) -> Any:
        """The version of this format that a record states; None if it is of another format."""
        return record.get(_VERSION) if record.get(_NAME) == self.name else None

    def check(
        self,
        record: object,
        place: str,
        file: str = "",
        error: type[SaeError] = FormatError,
        way_out: str = "",
        oldest: int = 0,
    ) -> None:
        """Raise an error unless a record has this format and a version that can be read.

        Args:
            record: content of the file.
            place: beginning of the message, such as `dictionary 'folder'`.
            file: name of the file, if the place is a folder.
            error: class of the error.
            way_out: end of the message; empty: updating the package is the only one.
            oldest: the oldest version that is read; a file without a version has version 0.
        """
        if not isinstance(record, Mapping) or record.get(_NAME) != self.name:
            which = f"{file} is not" if file else "not"
            raise error(f"{place}: {which} of this toolkit (no format {self.name!r}){way_out and f'; {way_out}'}")
        recorded = record.get(_VERSION, 0)
        if type(recorded) is int and recorded < oldest:
            raise error(f"{place}: format version {recorded} is older than this package reads ({oldest})")
        if type(recorded) is not int or recorded > self.version:
            raise error(
                f"{place}: format version {recorded} is newer than this package reads ({self.version}); "
                f"{way_out or 'update the package'}"
            )


def fingerprint_of(facts: object, **options: Any) -> str:
    """SHA-256 of facts that JSON can hold; it distinguishes results of different data, settings or versions."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, **options).encode()).hexdigest()


def as_read_back(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as they are read back from JSON: lists instead of tuples, text instead of other keys."""
    return json.loads(json.dumps(facts))
