"""Everything that a folder holds, compared with its hashes and read: a run, a cache, a dictionary, a feature store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sae import hashes
from sae.activations.cache import MANIFEST, THREADS, read_manifest, shard_problem
from sae.architectures import load
from sae.config_file import CONFIG_YAML, load_config
from sae.dictionary import CONFIG_FILE, WEIGHTS_FILE
from sae.errors import CacheError, SaeError
from sae.evaluation.report import DOCUMENTS_FILE, JSON_FILE, check_documents
from sae.features import Features, layout
from sae.hashes import SUMS, check, damaged, read_sums
from sae.paths import expanded
from sae.training.sinks import METRICS_FILE

_OURS = {
    MANIFEST, CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, CONFIG_YAML, layout.INDEX, layout.COLUMNS, layout.TOKENS,
    layout.DOCUMENTS, layout.VOCABULARY, "state.pt", "eval.json", "eval.md", "eval-documents.safetensors",
    "effects.json", "effects.safetensors", "effects.md", "probe.json", "probe.md", "compare.json", "compare.md",
    "sweep.json", "sweep.md", "superposition.json", "superposition.md", "cost.json",
}  # fmt: skip
"""What the toolkit writes: a folder without a list of hashes is known by it to be older than these."""


def verify(path: str | Path) -> tuple[int, list[str]]:
    """Compare every file of a folder with its hash, and read what must fit together. Nothing outside is read.

    Args:
        path: a run folder, a cache, a dictionary's folder, a feature store, or a folder of these.

    Returns:
        How many files have a hash, and a line for each that is missing, damaged, or contradicts another.

    Raises:
        CacheError: there is nothing there that this toolkit wrote.
    """
    root = expanded(path)
    checked: dict[Path, str | None] = {}
    problems: dict[str, None] = {}
    known = False
    for folder, names in _folders(root):
        here = dict(_compared(folder))
        known = known or bool(here or _OURS & set(names)) or (SUMS in names and not hashes.is_users(folder))
        checked |= here
        if not any(here.values()):
            problems |= dict.fromkeys(_misfits(folder, names))
    if not known:
        raise CacheError(
            f"{str(path)!r}: nothing there that sae wrote; give a run folder, a cache or a dictionary's folder"
        )
    found = [problem for problem in checked.values() if problem]
    return len(checked), [*found, *(problem for problem in problems if problem not in found)]


def record_hashes(path: str | Path) -> list[Path]:
    """Add the hashes of files that this toolkit wrote before it kept hashes; what has one keeps it.

    Returns:
        The files whose hashes were added.

    Raises:
        CacheError: the folder cannot be written, or has a `SHA256SUMS` of the user's.
    """
    added = []
    for folder, names in _folders(expanded(path)):
        listed = read_sums(folder)
        for name in sorted((_OURS & set(names)) - listed.keys()):
            if hashes.is_users(folder):
                raise CacheError(f"{str(folder / SUMS)!r}: sae did not write it, and adds nothing; rename it")
            if (folder / MANIFEST).exists() and name == layout.DOCUMENTS:
                continue  # the manifest has it
            try:
                hashes.record(folder / name)
            except OSError as error:
                raise CacheError(f"cannot write {str(folder / SUMS)!r}: {error.strerror}") from error
            added.append(folder / name)
    return added


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and the names in them that are no folders; symbolic links are not followed."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield Path(folder), [*names, *(name for name in folders if name in _OURS)]


def _compared(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Files that have a hash, by a list or a manifest, and what is wrong with each."""
    try:
        listed = sorted(read_sums(folder))
        manifest = read_manifest(folder) if os.path.lexists(folder / MANIFEST) else None
    except SaeError as error:
        yield folder / (SUMS if SUMS in str(error).partition(":")[0] else MANIFEST), str(error)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        yield from zip(
            [folder / name for name in listed], pool.map(lambda n: _problem(folder / n), listed), strict=True
        )
        if manifest is not None:
            names = list(manifest.files)
            found = pool.map(lambda name: shard_problem(folder, name, manifest.files[name]), names)
            yield from zip([folder / name for name in names], found, strict=True)


def _problem(path: Path) -> str | None:
    try:
        if path.is_symlink():
            raise damaged(path, "a symbolic link where a file should be")
        check(path)
    except SaeError as error:
        return str(error)
    return None


def _misfits(folder: Path, names: list[str]) -> Iterator[str]:
    """What is as it was written and yet cannot be read."""
    if any((folder / name).is_symlink() for name in names):
        return
    readers = [
        ({CONFIG_FILE, WEIGHTS_FILE}, load),
        ({layout.INDEX}, Features),
        ({JSON_FILE, DOCUMENTS_FILE}, check_documents),
        ({CONFIG_YAML}, lambda path: load_config(path / CONFIG_YAML)),
    ]
    for files, read in readers:
        if files <= set(names):
            try:
                read(folder)
            except SaeError as error:
                yield str(error)
