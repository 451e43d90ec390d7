"""Which files of a repository are a dictionary: the names that every format gives to them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Layout:
    """The files of a dictionary in its folder.

    Attributes:
        needed: without them there is no dictionary; the weights last.
        optional: read if they are there.
        above: read if they are in the folder above.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    above: tuple[str, ...] = ()


FOLDERS = (
    Layout(("config.json", "weights.safetensors"), ("SHA256SUMS",)),  # ours comes first: SAELens's may be next to it
    Layout(("cfg.json", "sae_weights.safetensors"), ("sparsity.safetensors",)),
    Layout(("cfg.json", "sae.safetensors"), above=("config.json",)),
    Layout(("config.json", "ae.pt")),
    Layout(("params.npz",)),
    Layout(("params.safetensors",), ("config.json",)),
    Layout(("hyperparams.json", "checkpoints/final.safetensors")),
    Layout(("autoencoder.pt",)),
    *(
        Layout(("config.json", f"{place}.{suffix}"))
        for place in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
        for suffix in ("safetensors", "pt")
    ),
)
"""Dictionaries that are folders. Of a folder that has the files of several, the first counts."""
FILES = {
    re.compile(r"layer\d+\.sae\.pt"): (),
    re.compile(r"layer_\d+\.safetensors"): ("config.yaml",),
    re.compile(r"\d+\.pt"): (),
}
"""Dictionaries that are files, and what is read from their folder too."""
LISTED_IN = "autoencoders"
"""Files that are only a number are dictionaries in folders of this name; elsewhere they are, if they are asked for."""


@dataclass(frozen=True)
class Found:
    """A dictionary among the files of a repository.

    Attributes:
        place: its folder, or its file.
        files: what has to be read, the weights last.
    """

    place: str
    files: tuple[str, ...]


def dictionaries_in(paths: Collection[str]) -> dict[str, Found]:
    """All dictionaries among files, by their places, in the order of their names."""
    known, folders = set(paths), dict.fromkeys(parent for path in paths for parent in _parents(path))
    found = [one for folder in folders for one in _in_folder(folder, known)]
    used = {file for one in found for file in one.files}
    found += [one for path in known - used for one in _as_file(path, known)]
    return {one.place: one for one in sorted(found, key=lambda one: _natural(one.place))}


def find(paths: Collection[str], path: str) -> list[Found]:
    """The dictionary at a path, which may be that of one of its files; otherwise all below the path."""
    all_found = dictionaries_in(paths)
    if path in all_found:
        return [all_found[path]]
    if path in paths:
        whole = [one for one in all_found.values() if path in one.files and path.startswith(_join(one.place, ""))]
        return whole or ([Found(path, (path,))] if path.endswith(".pt") else [])
    return [one for place, one in all_found.items() if not path or place.startswith(f"{path}/")]


def _in_folder(folder: str, known: Collection[str]) -> Iterator[Found]:
    for layout in FOLDERS:
        needed = [_join(folder, name) for name in layout.needed]
        if all(path in known for path in needed):
            above = [_join(_parent(folder), name) for name in layout.above] if folder else []
            more = [path for path in (*above, *(_join(folder, name) for name in layout.optional)) if path in known]
            yield Found(folder, (*more, *needed))
            return


def _as_file(path: str, known: Collection[str]) -> Iterator[Found]:
    folder, name = _parent(path), PurePosixPath(path).name
    for pattern, beside in FILES.items():
        needed = [_join(folder, other) for other in beside]
        listed = not name[:-3].isdecimal() or PurePosixPath(folder).name == LISTED_IN
        if pattern.fullmatch(name) and listed and all(other in known for other in needed):
            yield Found(path, (*needed, path))
            return


def _parents(path: str) -> Iterator[str]:
    """The folders that a file is in, from the repository's on."""
    yield ""
    parts = path.split("/")[:-1]
    yield from ("/".join(parts[:length]) for length in range(1, len(parts) + 1))


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]
