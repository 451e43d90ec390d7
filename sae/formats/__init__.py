"""Dictionaries of other toolkits: read from their files, and written to them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol, cast

import torch

from sae import architectures
from sae.dictionary.base import CONFIG_FILE, WEIGHTS_FILE, Dictionary
from sae.errors import ConfigError, FormatError
from sae.files.folders import complete_folder
from sae.files.paths import expanded, resolve
from sae.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    llamascopium,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)  # fmt: skip
from sae.formats.foreign import CONVERTED, Foreign, dictionary_of, other_format
from sae.hub import Snapshot, located, missing
from sae.numerics.modes import defaults

OWN = "sae"
_NUMBERS = re.compile(r"(\d+)")


class Format(Protocol):
    """A module of this package: a format that is read, and perhaps written by `write`, or by `write_set` if its files
    hold several dictionaries."""

    NAME: str
    TITLE: str

    def find(self, path: Path) -> Path | None: ...

    def read(self, path: Path) -> Foreign: ...


FORMATS: dict[str, Format] = {
    module.NAME: cast(Format, module)
    for module in (
        saelens, sparsify, dictionary_learning, gemma_scope, llama_scope, qwen_scope,
        llamascopium, circuit_tracer, openai,
    )
}  # fmt: skip
"""The formats of other toolkits, by name."""
WRITERS: dict[str, Callable[[Dictionary, Path], list[str]]] = {
    name: module.write  # pyright: ignore[reportAttributeAccessIssue]
    for name, module in FORMATS.items()
    if hasattr(module, "write")
}
"""Those that can be written."""
SET_WRITERS: dict[str, Callable[[Mapping[str, Dictionary], Callable[[str], Dictionary], Path], list[str]]] = {
    circuit_tracer.NAME: circuit_tracer.write_set
}
"""Those that hold several dictionaries: outlines by name, and a function that loads one of them, are written to a
folder."""


@torch.inference_mode(False)
def load(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Dictionary:  # fmt: skip
    """Load a dictionary of this toolkit, or of another: SAELens, sparsify, dictionary_learning, Llamascopium, OpenAI,
    Gemma Scope, Llama Scope, Qwen-Scope or circuit-tracer.

    No code of those toolkits is needed, and none in the files is run. What cannot be used here is refused by name.

    Args:
        path: a dictionary's folder, the run folder that holds one, or the file of a format that has only one; or a name
            of the hub: `organisation/repository`, with `@revision` and `:path` if wanted, or `release/dictionary`, such
            as `gpt2-small-res-jb/8`. What exists on this machine is never looked for on the hub.
        device: device of its weights.
        dtype: their number type; None: the one they are stored in, at least float32 for other toolkits' files.

    Returns:
        A dictionary in evaluation mode that takes raw activations `[..., d_in]`. Its `metadata["converted"]`, if it
        comes from another toolkit, has the format, what was folded into the weights, what is carried in its `frame`,
        and the settings of its files; `metadata["hub"]`, if it comes from the hub, has repository, commit and path.
        Even inside `torch.inference_mode`, its weights are ordinary tensors, through which gradients can flow
        afterwards.

    Raises:
        FormatError: no dictionary there, a hub that does not give it, one that cannot be used here, a newer version of
            our format, a pickle with more than tensors, or weights that are damaged or of the wrong shape.
    """
    place = located(path)
    source = Snapshot.of(place)
    dictionary = _converted(place, path, source, dtype)
    if dictionary is None:
        dictionary = architectures.load(path if source is None else place, device=device)
        dictionary = dictionary if dtype is None else dictionary.to(dtype)
    return _recorded(dictionary.to(device), source)


@torch.inference_mode(False)
def outline(path: str | Path) -> Dictionary:
    """A dictionary without its weights: settings, sizes and metadata. Only another toolkit's is loaded for it.

    Raises:
        FormatError: as `load`, but damage to the weights of a dictionary of this toolkit is not noticed.
    """
    place = located(path)
    source = Snapshot.of(place)
    dictionary = _converted(place, path, source, None)
    return _recorded(dictionary or architectures.outline(path if source is None else place), source)


def _recorded(dictionary: Dictionary, source: Snapshot | None) -> Dictionary:
    """The dictionary with a record of where on the hub it is from."""
    if source is not None:
        dictionary.metadata |= source.record
    return dictionary


def _converted(
    place: Path, path: str | Path, source: Snapshot | None, dtype: torch.dtype | None
) -> Dictionary | None:  # fmt: skip
    """The dictionary of another toolkit; None if there is none of another toolkit.

    Args:
        place: where it is.
        path: as the user wrote it.
        source: where it is from, if it is in the hub's cache.
        dtype: as for `load`.

    Raises:
        FormatError: it cannot be used here; there are several of them; or there is nothing.
    """
    is_own = all(os.path.lexists(place / name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    for module in FORMATS.values() if not is_own else ():
        found = _found(module.find, place)
        if found is not None:
            with defaults():
                foreign = module.read(found) if source is None else _with_origin(module.read(found), source)
                return dictionary_of(foreign, f"dictionary {str(found)!r}", dtype)
    own = resolve(place, "dictionary", CONFIG_FILE)
    if (own is None or not (own / WEIGHTS_FILE).exists()) and (inside := _dictionaries_in(place, ours=own is None)):
        names = ", ".join(inside[:4]) + (", …" if len(inside) > 4 else "")
        raise FormatError(f"{str(path)!r}: holds {len(inside)} dictionaries, give one of them: {names}")
    if own is None and not os.path.lexists(place):
        raise missing(path, f"no {CONFIG_FILE} there; give a dictionary folder or a run folder, or")
    return None


def _with_origin(foreign: Foreign, source: Snapshot) -> Foreign:
    """A dictionary with what its release knows and its files do not say."""
    scale = source.scale if foreign.settings.get("normalize_activations") == "expected_average_only_in" else None
    metadata = {**source.published, **source.origin(foreign.metadata)}
    return replace(foreign, metadata=metadata, input_scale=scale or foreign.input_scale)


def _found(find: Callable[[Path], Path | None], place: Path) -> Path | None:
    """What a format finds at a path; None if the system cannot look there, which has an error of its own."""
    try:
        return find(place)
    except (OSError, ValueError):
        return None


def load_all(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Dictionary]:  # fmt: skip
    """Load all dictionaries of a folder: layers of a circuit-tracer set, modules of a sparsify run, runs of a sweep.

    `sae.splice(model, list(dictionaries.values()))` puts them into the model together.

    Args:
        path: the folder that holds them, next to each other.
        device, dtype: see `load`.

    Returns:
        The dictionaries by the names of their files or folders, in the order of the numbers in these.

    Raises:
        FormatError: there is none, or one cannot be loaded (see `load`).
    """
    place = expanded(path)
    names = dictionaries_in(place)
    if not names:
        raise FormatError(f"{str(path)!r}: no dictionaries next to each other there; for a single one, use sae.load")
    return {name: load(place / name, device=device, dtype=dtype) for name in names}


def dictionaries_in(path: str | Path) -> list[str]:
    """Names of the dictionaries that lie next to each other in a folder, in the order of their numbers."""
    return _dictionaries_in(expanded(path), ours=True)


def _dictionaries_in(folder: Path, *, ours: bool = False) -> list[str]:
    """Names in a folder that are dictionaries of other toolkits, or any; at most 1,000 entries are looked at."""
    try:
        entries = list(islice(folder.iterdir(), 1000)) if folder.is_dir() else []
    except OSError:
        return []
    found = [
        entry.name
        for entry in entries
        if any(_found(module.find, entry) not in (None, folder) for module in FORMATS.values())
        or (ours and entry.is_dir() and _found(_own_weights, entry))
    ]
    return sorted(found, key=_by_numbers)


def places_of(place: str | Path) -> list[str | Path]:
    """The place itself if it is a dictionary's, else those of the dictionaries in it."""
    folder = located(place)
    if resolve(folder, "dictionary", CONFIG_FILE) is not None:
        return [place]
    return [folder / name for name in dictionaries_in(folder)] or [place]


def _by_numbers(name: str) -> list[tuple[str, int]]:
    """A key that sorts `layer_2` before `layer_10`."""
    parts = _NUMBERS.split(name)
    return [(text, int(number)) for text, number in zip(parts[::2], [*parts[1::2], "-1"], strict=True)]


def _own_weights(entry: Path) -> Path | None:
    """The weights of a dictionary in our format, in a folder or in a run folder."""
    own = resolve(entry, "dictionary", CONFIG_FILE)
    return own / WEIGHTS_FILE if own is not None and (own / WEIGHTS_FILE).is_file() else None


@dataclass(frozen=True)
class Conversion:
    """What became of a dictionary in another format, or of several.

    Attributes:
        source: the format it was read from; several are joined.
        target: the format it was written to.
        folded: what was folded into its weights when it was read.
        lost: what the written format cannot hold.
        dictionaries: number of dictionaries.
    """

    source: str
    target: str
    folded: tuple[str, ...]
    lost: tuple[str, ...]
    dictionaries: int = 1


def convert(source: str | Path | Sequence[str | Path], target: str | Path, to: str) -> Conversion:
    """Read a dictionary of any format, and write it to a folder in another.

    Args:
        source: what `load` takes. For `circuit_tracer`, which holds a transcoder for each layer, also several of these,
            or folders of several, such as a sweep.
        target: the folder; it must be new or empty.
        to: `sae` for our own format, or a key of `WRITERS` or `SET_WRITERS`.

    Raises:
        ConfigError: there is no such format to write, it does not hold several, or the folder has files.
        FormatError: a dictionary cannot be read, or the format cannot hold it.
        CacheError: the folder cannot be written.
    """
    to = to.replace("-", "_")
    if to not in (OWN, *WRITERS, *SET_WRITERS):
        raise ConfigError(f"format {to!r}: written are {', '.join((OWN, *WRITERS, *SET_WRITERS))}")
    sources = [source] if isinstance(source, str | Path) else list(source)
    if len(sources) != 1 and to not in SET_WRITERS:
        raise ConfigError(
            f"{len(sources)} dictionaries: only {', '.join(SET_WRITERS)} holds several; convert each into a folder of "
            "its own"
        )
    folder = expanded(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{str(target)!r}: already there; give a new folder")
    if to in SET_WRITERS:
        return _convert_set(sources, folder, to)
    dictionary = load(sources[0])
    lost: list[str] = []
    if to == OWN:
        dictionary.save(folder)
    else:
        with defaults(), torch.no_grad():
            lost = WRITERS[to](dictionary, folder)
    return Conversion(other_format(dictionary) or OWN, to, _folded(dictionary), tuple(lost))


def _convert_set(sources: Sequence[str | Path], folder: Path, to: str) -> Conversion:
    """The same for a format that holds several dictionaries."""
    places = {repr(str(place)): place for source in sources for place in places_of(source)}
    outlines = {name: outline(place) for name, place in places.items()}
    folded: dict[str, list[str]] = {}

    def loaded(name: str) -> Dictionary:
        dictionary = load(places[name])
        for part in _folded(dictionary):
            folded.setdefault(part, []).append(name)
        return dictionary

    with defaults(), complete_folder(folder) as unfinished:
        lost = SET_WRITERS[to](outlines, loaded, unfinished)
    said = tuple(
        part if len(names) == len(places) else f"{part} ({', '.join(names)})" for part, names in folded.items()
    )
    formats = dict.fromkeys(other_format(outline) or OWN for outline in outlines.values())
    return Conversion(", ".join(formats), to, said, tuple(lost), len(places))


def _folded(dictionary: Dictionary) -> tuple[str, ...]:
    """What was folded into the weights of a dictionary of another toolkit."""
    return () if other_format(dictionary) is None else tuple(dictionary.metadata[CONVERTED].get("folded", ()))


__all__ = [
    "FORMATS", "SET_WRITERS", "WRITERS", "Conversion", "Format", "convert", "dictionaries_in", "load", "load_all",
    "outline", "places_of",
]  # fmt: skip
