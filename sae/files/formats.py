"""What stands at the head of a file that the toolkit wrote: its format and version, and the version of the package."""

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
    """A kind of file.

    Attributes:
        name: at the head of every such file.
        version: that is written, and the newest that is read.
    """

    name: str
    version: int

    def head(self) -> dict[str, Any]:
        """Format and version, for what is read again by any version of the package."""
        return {_NAME: self.name, _VERSION: self.version}

    def result_head(self) -> dict[str, Any]:
        """The same with the package's version, for results, which another version might compute differently."""
        return {**self.head(), _PACKAGE: version.__version__}

    def holds(self, record: Mapping[str, Any], **asked: Any) -> bool:
        """Whether a record is of this format, in this version, and has just these values."""
        return all(record.get(key) == value for key, value in (self.head() | asked).items())

    def is_current(self, record: Mapping[str, Any], **asked: Any) -> bool:
        """The same, and made by this version of the package; a result that is not is made anew."""
        return self.holds(record, **{_PACKAGE: version.__version__}, **asked)

    def version_of(self, record: Mapping[str, Any]) -> Any:
        """The version of this format that a record says it is of."""
        return record.get(_VERSION) if record.get(_NAME) == self.name else None

    def check(self, record: object, place: str, file: str = "", error: type[SaeError] = FormatError) -> None:
        """Raise an error unless a record is of this format and of a version that is read.

        Args:
            record: what the file holds.
            place: what the message begins with, such as `dictionary 'folder'`.
            file: name of the file in it, if the place is a folder.
            error: the kind that is raised.
        """
        if not isinstance(record, Mapping) or record.get(_NAME) != self.name:
            which = f"{file} is not" if file else "not"
            raise error(f"{place}: {which} of this toolkit (no format {self.name!r})")
        found = record.get(_VERSION, 0)
        if type(found) is not int or found > self.version:
            raise error(
                f"{place}: format version {found} is newer than this package reads ({self.version}); update the package"
            )


def fingerprint_of(facts: object) -> str:
    """SHA-256 of facts that JSON can hold: what tells a result from one of other data, settings or versions."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def as_read_back(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as JSON gives them back: lists for tuples, text for other keys."""
    return json.loads(json.dumps(facts))
