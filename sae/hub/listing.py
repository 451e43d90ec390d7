"""Lists the dictionaries of a release or a repository, with the numbers that were published with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.errors import FormatError
from sae.hub.download import commit_of, fetch, files_of
from sae.hub.layouts import Found, dictionaries_in
from sae.hub.names import HubName, missing, parse_name
from sae.hub.releases import RELEASES, Published, release_of

REGISTRY, FOLDER = "SAELens's registry", "folder's name"
NO_NUMBERS = Published()
_MOST_READ = 64
"""Small files with numbers that are downloaded for a list."""
_L0 = re.compile(r"average_l0_(\d+)|L0_(\d+)")


@dataclass(frozen=True)
class Entry:
    """A dictionary in a list.

    Attributes:
        id: what comes after `/` of a release, or after `:` of a repository.
        name: what `sae.load` takes.
        numbers: published with it.
        source: where the numbers are from; empty: there are none.
    """

    id: str
    name: str
    numbers: Published = NO_NUMBERS
    source: str = ""


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
        repository's tree, folders' names, and at most 64 small files.

    Raises:
        FormatError: the name stands for nothing, or the hub does not give the repository.
    """
    place = parse_name(name)
    if place is None:
        raise missing(name, "unknown; give")
    release = RELEASES.get(name.partition("@")[0])
    if release is not None and release.paths:
        entries = tuple(
            Entry(id, f"{name}/{id}", release.published.get(id, NO_NUMBERS), REGISTRY if release.published else "")
            for id in release.paths
        )
        return Listing(release.repository, release.model, entries, _notes(name))
    commit = commit_of(place)
    files = files_of(place, commit, place.path)
    found = dictionaries_in(files)
    if not found:
        raise FormatError(f"repository {str(place)!r}: the hub has it, but no dictionary of a known format is there")
    shown = [set(files)] * _MOST_READ + [set[str]()] * max(0, len(found) - _MOST_READ)
    entries = tuple(_entry(name, place, commit, *one) for one in zip(found.values(), shown, strict=False))
    known = release_of(place.repository, entries[0].id)
    model = release.model if release is not None else RELEASES[known[0]].model if known else ""
    return Listing(place.repository, model, entries, _notes(name) if release is not None else ())


def _notes(name: str) -> tuple[str, ...]:
    release = RELEASES[name.partition("@")[0]]
    notes = []
    if release.processing != "none":
        notes.append(f"They take activations of {release.model} with weight_processing={release.processing}.")
    if release.normalisation == "per token":
        notes.append("They normalise each token by itself.")
    return tuple(notes)


def _entry(name: str, place: HubName, commit: str, found: Found, files: Set[str]) -> Entry:
    is_release = name.partition("@")[0] in RELEASES
    id = found.place.removeprefix(place.path).strip("/") if is_release else found.place
    numbers, source = _numbers(place, commit, found, files)
    return Entry(id, f"{name}/{id}" if is_release else str(place.at(found.place)), numbers, source)


def _numbers(place: HubName, commit: str, found: Found, files: Set[str]) -> tuple[Published, str]:
    """Published numbers of a dictionary, and where they are from.

    Args:
        place: the repository.
        commit: of it.
        found: the dictionary.
        files: of the repository; those with numbers are downloaded.
    """
    if match := _L0.search(f"{place.repository}/{found.place}"):
        return Published(float(match[1] or match[2])), FOLDER
    for file, read in _READERS.items():
        path = f"{found.place}/{file}".strip("/")
        if path in files:
            numbers = read(_json(fetch(place, commit, (path,)) / path))
            if numbers != NO_NUMBERS:
                return numbers, file
    return NO_NUMBERS, ""


def _of_report(record: Mapping[str, Any]) -> Published:
    """Our report's."""
    fvu = _number(record.get("fvu"))
    return Published(_number(record.get("l0")), None if fvu is None else 1 - fvu)


def _of_settings(record: Mapping[str, Any]) -> Published:
    """SAELens's, which writes the last L0 of a training."""
    metadata = record.get("metadata")
    return Published(_number(metadata.get("l0") if isinstance(metadata, Mapping) else None))


def _number(value: object) -> float | None:
    value = value.get("value") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


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
