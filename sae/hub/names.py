"""Names of dictionaries on the hub: `organisation/repository@revision:path`, and `release/dictionary`."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sae.errors import FormatError
from sae.files.paths import expanded
from sae.hub.releases import RELEASES

MAIN = "main"
_REVISION = r"(?:@(?P<revision>[\w.][\w./+-]*))?"
_REPOSITORY = re.compile(rf"(?P<repository>\w[\w.-]*/\w[\w.-]*){_REVISION}(?::(?P<path>[^\s].*)?)?")
_RELEASE = re.compile(r"(?P<release>[\w.-]+)(?:@(?P<revision>[\w.+-]+))?(?:/(?P<key>.*))?")


@dataclass(frozen=True)
class HubName:
    """A dictionary, or several, in a repository of the hub.

    Attributes:
        repository: `organisation/name`.
        path: folder or file in it; empty: the whole repository.
        revision: a branch, a tag or a commit.
    """

    repository: str
    path: str = ""
    revision: str = MAIN

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repository}{revision}{f':{self.path}' if self.path else ''}"

    def at(self, path: str) -> HubName:
        """The same at another path."""
        return HubName(self.repository, path, self.revision)


def parse_name(name: str | Path) -> HubName | None:
    """The place on the hub that a name stands for. Nothing is asked of the hub.

    Args:
        name: `organisation/repository`, with `@revision` and `:path` if wanted, or `release/dictionary`, where the
            release is one of `RELEASES`, with `@revision` after its name if wanted.

    Returns:
        None for what is a path: something that exists, is absolute, begins with `.` or `~`, or is in a folder that
        exists; and for anything else that is not such a name.

    Raises:
        FormatError: the release has no such dictionary.
    """
    text = str(name)
    if _is_path(text):
        return None
    match = _RELEASE.fullmatch(text)
    if match is not None and match["release"] in RELEASES:
        release = RELEASES[match["release"]]
        key = (match["key"] or "").rstrip("/")
        if not all(map(_is_relative, (key, match["revision"]))):
            return None
        path = release.folder if not key else release.path_of(match["release"], key)
        return HubName(release.repository, path, match["revision"] or MAIN)
    return parse_repository(text)


def parse_repository(text: str) -> HubName | None:
    """The place in a repository that `organisation/repository@revision:path` stands for, whatever is on this machine.

    Returns:
        None for anything else, and for a name that begins with that of a release.
    """
    match = _REPOSITORY.fullmatch(text)
    if (
        match is None
        or text.partition("/")[0] in RELEASES
        or not all(map(_is_relative, match.group("path", "revision")))
    ):
        return None
    return HubName(match["repository"], (match["path"] or "").strip("/"), match["revision"] or MAIN)


def missing(name: str | Path, reason: str) -> FormatError:
    """The error for what is neither on this machine nor a name of the hub, with the way out.

    Args:
        name: as the user wrote it.
        reason: what is wrong, up to `give` or `or`, after which names of the hub are listed.
    """
    release = str(name).partition("/")[0].partition("@")[0]
    [nearest, *_] = [*difflib.get_close_matches(release, list(RELEASES), 1, 0.8), ""]
    first, text = str(name).partition("/")[0], str(name)
    if not {"@", ":"} & set(text) and Path(first).is_dir() and parse_repository(text) is not None:
        here = f"; folder {first!r} exists here: if you mean the hub's, write {f'{text}@{MAIN}'!r}"
    else:
        here = ""
    meant = f"; did you mean the release {nearest!r}?" if nearest else ""
    return FormatError(
        f"dictionary {str(name)!r}: {reason} a name of the hub, ORGANISATION/REPOSITORY[@REVISION][:PATH] or "
        f"RELEASE/DICTIONARY ('sae list' shows the releases){meant}{here}"
    )


def _is_relative(path: str | None) -> bool:
    """Whether a path leads downwards."""
    return path is None or not {"..", "."} & set(path.split("/"))


def _is_path(text: str) -> bool:
    """Whether a text is the path of something on this machine rather than a name of the hub."""
    place = expanded(text)
    if os.path.lexists(place) or place.is_absolute() or text.startswith((".", "~")):
        return True
    first = text.partition("/")[0]
    return not {"@", ":"} & set(text) and first not in RELEASES and Path(first).is_dir()
