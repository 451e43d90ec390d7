"""Lists the dictionaries of a release or a repository, with the numbers that were published with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sae.dictionary.published import Published, finite
from sae.errors import DamagedError, FormatError
from sae.hub.download import commit_of, fetch, files_of
from sae.hub.layouts import Found, dictionaries_in
from sae.hub.names import HubName, missing, parse_name
from sae.hub.releases import RELEASES, release_of

FOLDER = "folder's name"
NO_NUMBERS = Published()
_MOST_READ = 64
"""Small files with numbers that are downloaded for a list."""
_SMALL = 1 << 20
"""Bytes of the largest file that is downloaded for a list."""
_L0 = re.compile(r"average_l0_(\d+)|L0_(\d+)")


@dataclass(frozen=True)
class Entry:
    """A dictionary in a list.

    Attributes:
        id: what comes after `/` of a release, or after `:` of a repository.
        name: what `sae.load` takes.
        numbers: published with it.
    """

    id: str
    name: str
    numbers: Published = NO_NUMBERS

    @property
    def source(self) -> str:
        """Where the numbers are from; empty: there are none."""
        return self.numbers.source if self.numbers.numbers else ""


@dataclass(frozen=True)
class Listing:
    """The dictionaries of a release or a repository.

    Attributes:
        repository: on the hub.
        model: their language model; empty: unknown.
        entries: a dictionary each.
        notes: what holds for all of them, a sentence each.
    """

    repository: str
    model: str
    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()


def list_dictionaries(name: str) -> Listing:
    """List the dictionaries of a release or a repository.

    Args:
        name: of a release (see `RELEASES`), or `organisation/repository`, with `@revision` and `:path` if wanted.

    Returns:
        Their ids and published numbers: of a release whose ids are known, without asking the hub; otherwise from the
        repository's tree, folders' names, and at most 64 files of at most 1 MiB.

    Raises:
        FormatError: the name stands for nothing, or the hub does not give the repository.
    """
    place = parse_name(name)
    if place is None:
        raise missing(name, "unknown; give")
    name = name.rstrip("/")
    release = RELEASES.get(_release_in(name))
    if release is not None and release.paths:
        entries = tuple(Entry(id, f"{name}/{id}", release.published.get(id, NO_NUMBERS)) for id in release.paths)
        return Listing(release.repository, release.model, entries, _notes(name))
    commit = commit_of(place)
    files = files_of(place, commit, place.path)
    found = dictionaries_in(files)
    if not found:
        raise FormatError(f"repository {str(place)!r}: the hub has it, but no dictionary of a known format is there")
    small = _SmallFiles(place, commit, {path for path, size in files.items() if size <= _SMALL})
    entries = tuple(_entry(name, place, one, small) for one in found.values())
    known = release_of(place.repository, entries[0].id)
    model = release.model if release is not None else RELEASES[known[0]].model if known else ""
    notes = _notes(name) if release is not None else ()
    return Listing(place.repository, model, entries, (*notes, *small.notes))


def _release_in(name: str) -> str:
    """The release that a name is, maybe with a revision; empty if it is that of a dictionary."""
    return "" if "/" in name else name.partition("@")[0]


def _notes(name: str) -> tuple[str, ...]:
    release = RELEASES[_release_in(name)]
    notes = []
    if release.processing != "none":
        notes.append(f"They take activations of {release.model} with weight_processing={release.processing}.")
    if release.normalisation == "per token":
        notes.append("They normalise each token by itself.")
    return tuple(notes)


@dataclass
class _SmallFiles:
    """The small files of a repository, of which some are downloaded for their numbers.

    Attributes:
        place: the repository.
        commit: of it.
        paths: of the files that are small enough.
        left: files that may still be downloaded.
        notes: a sentence on each file that was left out.
    """

    place: HubName
    commit: str
    paths: set[str]
    left: int = _MOST_READ
    notes: list[str] = field(default_factory=list)

    def read(self, path: str) -> Mapping[str, Any]:
        """Content of a file in JSON; empty if it is not there, or not read."""
        if path not in self.paths or not self.left:
            return {}
        self.left -= 1
        try:
            return _json(fetch(self.place, self.commit, (path,)) / path)
        except DamagedError as error:
            self.notes.append(f"Without its numbers: {error}.")
            return {}


def _entry(name: str, place: HubName, found: Found, small: _SmallFiles) -> Entry:
    is_release = _release_in(name) in RELEASES
    id = found.place.removeprefix(place.path).strip("/") if is_release else found.place
    return Entry(id, f"{name}/{id}" if is_release else str(place.at(found.place)), _numbers(place, found, small))


def _numbers(place: HubName, found: Found, small: _SmallFiles) -> Published:
    """Published numbers of a dictionary."""
    if match := _L0.search(f"{place.repository}/{found.place}"):
        return Published(float(match[1] or match[2]), source=FOLDER)
    for file, read in _READERS.items():
        numbers = read(small.read(f"{found.place}/{file}".strip("/")))
        if numbers.numbers:
            return replace(numbers, source=file)
    return NO_NUMBERS


def _of_report(record: Mapping[str, Any]) -> Published:
    """Our report's."""
    fvu = _number(record.get("fvu"))
    return Published(_number(record.get("l0")), None if fvu is None else 1 - fvu)


def _of_settings(record: Mapping[str, Any]) -> Published:
    """SAELens's, which writes the last L0 of a training."""
    metadata = record.get("metadata")
    return Published(_number(metadata.get("l0") if isinstance(metadata, Mapping) else None))


def _number(value: object) -> float | None:
    return finite(value.get("value") if isinstance(value, Mapping) else value)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


_READERS: dict[str, Callable[[Mapping[str, Any]], Published]] = {
    "eval.json": _of_report,
    "cfg.json": _of_settings,
    "config.json": lambda record: Published(_number(record.get("l0"))),  # Gemma Scope 2
}
"""Small files next to a dictionary that may have numbers."""
