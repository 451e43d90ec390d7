"""Verifies a run, cache, dictionary or feature store: compares every file with its hash, and reads it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sae.activations.manifest import MANIFEST, read_manifest, shard_problem
from sae.activations.tokens import THREADS
from sae.architectures import load
from sae.config.file import CONFIG_YAML, TRUST_SETTING, load_config
from sae.config.progress import Progress, announce, silent
from sae.dictionary.base import CONFIG_FILE, WEIGHTS_FILE
from sae.errors import CacheError, SaeError
from sae.evaluation.report import DOCUMENTS_FILE, JSON_FILE
from sae.evaluation.stored import check_documents
from sae.features import Features, layout
from sae.files.damage import PARTS, SUMS, damaged
from sae.files.hashes import UnhashedWarning, check
from sae.files.paths import expanded
from sae.files.sums import is_users, read_sums, record
from sae.formats import circuit_tracer
from sae.runs.folder import check_run
from sae.training.sinks import METRICS_FILE

_OURS = {
    MANIFEST, CONFIG_FILE, WEIGHTS_FILE, METRICS_FILE, CONFIG_YAML, layout.INDEX, layout.COLUMNS, layout.TOKENS,
    layout.DOCUMENTS, layout.VOCABULARY, "state.pt", "eval.json", "eval.md", "eval-documents.safetensors",
    "effects.json", "effects.safetensors", "effects.md", "probe.json", "probe.md", "compare.json", "compare.md",
    "sweep.json", "sweep.md", "superposition.json", "superposition.md", "cost.json",
}  # fmt: skip
"""Names of files that sae writes; a folder that has them but no list of hashes is older than such lists."""
_SHOWN = 5
_Identity = tuple[int, int]


@dataclass(frozen=True)
class _Part:
    """A folder, the names in it that are not folders, its files with hashes, and problems with the list."""

    folder: Path
    names: list[str]
    checks: dict[Path, Callable[[], str | None]]
    problems: dict[Path, str]

    def is_ours(self) -> bool:
        listed = bool(self.checks or self.problems or _OURS & set(self.names))
        return listed or (SUMS in self.names and not is_users(self.folder))


def verify(path: str | Path, progress: Progress | None = None) -> tuple[int, list[str]]:
    """Compare every file of a folder with its hash, and read parts that must fit together.

    Linked folders are followed, and the cache named by a run's `harvest.cache` is checked too; each once.

    Args:
        path: a run folder, a cache, a dictionary's folder, a feature store, or a folder of these.
        progress: called with (stage, files done, files in total).

    Returns:
        The number of files with a hash, and a line for each file that is missing, damaged or contradicts another.

    Raises:
        CacheError: the folder holds nothing that sae wrote.
    """
    root, seen, report = expanded(path), set[_Identity](), progress or silent
    links: dict[str, None] = {}
    parts = [_part(folder, names) for folder, names in _folders(root, seen, links)]
    if not any(part.is_ours() for part in parts):
        raise CacheError(
            f"{str(path)!r}: nothing there that sae wrote; give a run folder, a cache or a dictionary's folder"
        )
    for cache in _caches_elsewhere(parts, report):
        parts += [_part(folder, names) for folder, names in _folders(cache, seen, links)]
    _warn_of_unhashed(parts)
    checked = _checked(parts, report)
    problems = dict.fromkeys(
        problem
        for part in parts
        if not any(checked[file] for file in (*part.checks, *part.problems))
        for problem in _contradictions(part.folder, part.names)
    )
    lines = [*links, *(problem for problem in checked.values() if problem)]
    return len(checked), [*lines, *(problem for problem in problems if problem not in lines)]


def record_hashes(path: str | Path) -> list[Path]:
    """Add hashes for files that sae wrote before it recorded hashes; existing hashes are kept.

    Returns:
        The files whose hashes were added.

    Raises:
        CacheError: the folder cannot be written, or has a `SHA256SUMS` that belongs to the user.
    """
    added = []
    for folder, names in _folders(expanded(path), set(), {}):
        listed = read_sums(folder)
        for name in sorted((_OURS & set(names)) - listed.keys()):
            if is_users(folder):
                raise CacheError(f"{str(folder / SUMS)!r}: sae did not write it and does not change it; rename it")
            if (folder / MANIFEST).exists() and name == layout.DOCUMENTS:
                continue  # the manifest has it
            try:
                record(folder / name)
            except OSError as error:
                raise CacheError(f"cannot write {str(folder / SUMS)!r}: {error.strerror}") from error
            added.append(folder / name)
    return added


def _folders(root: Path, seen: set[_Identity], broken: dict[str, None]) -> Iterator[tuple[Path, list[str]]]:
    """Folders, and the names in them that are not folders. Links to folders that sae wrote are followed, once.

    Args:
        root: folder to start from.
        seen: folders already visited; new ones are added.
        broken: lines about broken links are added.
    """
    for folder, folders, names in os.walk(root, followlinks=True):
        identity = _identity(Path(folder))
        if identity is None or identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        place = Path(folder)
        folders[:] = sorted(name for name in folders if not (place / name).is_symlink() or _is_part(place / name))
        broken_links = [name for name in names if name in PARTS and (place / name).is_symlink()]
        broken |= dict.fromkeys(
            f"{str(place / name)!r}: leads to {str((place / name).readlink())!r}, which is not a folder; attach that "
            "disk or restore it, or delete the link"
            for name in broken_links
        )
        yield place, [*names, *(name for name in folders if name in _OURS)]


def _identity(folder: Path) -> _Identity | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_part(folder: Path) -> bool:
    """Whether a linked folder is a part of a run folder, or holds a file that sae wrote."""
    try:
        return folder.name in PARTS or any(file.name in {SUMS, *_OURS} for file in folder.iterdir())
    except OSError:
        return False


def _caches_elsewhere(parts: Iterable[_Part], progress: Progress) -> Iterator[Path]:
    """The folders that runs name as `harvest.cache`."""
    for part in parts:
        if CONFIG_YAML not in part.names or not (part.folder / CONFIG_YAML).is_file():
            continue
        with contextlib.suppress(SaeError):  # problems with the configuration are found when it is checked
            config = load_config(part.folder / CONFIG_YAML, [f"{TRUST_SETTING}=false"])
            if config.harvest.cache and config.cache_folder.is_dir():
                yield config.cache_folder
            elif config.harvest.cache:
                announce(
                    progress,
                    f"{str(part.folder)!r}: its cache {str(config.cache_folder)!r} does not exist, and was not checked",
                )


def _warn_of_unhashed(parts: Iterable[_Part]) -> None:
    """Warn of files from sae that are in no list, because an older version wrote them or the list was cut."""
    unhashed = [
        part.folder / name
        for part in parts
        if not part.problems
        for name in sorted(_OURS & set(part.names))
        if part.folder / name not in part.checks
        and not (name == MANIFEST and part.checks)  # reading it compares the shards, and its own hash
    ]
    if unhashed:
        shown = ", ".join(repr(str(path)) for path in unhashed[:_SHOWN]) + (" …" if len(unhashed) > _SHOWN else "")
        have = "file has" if len(unhashed) == 1 else "files have"
        warnings.warn(
            f"{len(unhashed)} {have} no hash in {SUMS} and cannot be compared: {shown}; 'sae verify --record' adds "
            "hashes of the current files",
            UnhashedWarning,
            stacklevel=3,
        )


def _part(folder: Path, names: list[str]) -> _Part:
    """A folder with its files that have a hash in a list or a manifest."""
    try:
        listed = sorted(read_sums(folder))
        manifest = read_manifest(folder) if os.path.lexists(folder / MANIFEST) else None
    except SaeError as error:
        culprit = folder / (SUMS if SUMS in str(error).partition(":")[0] else MANIFEST)
        return _Part(folder, names, {}, {culprit: str(error)})
    checks = {folder / name: partial(_problem, folder / name) for name in listed}
    if manifest is not None:
        checks |= {folder / name: partial(shard_problem, folder, name, entry) for name, entry in manifest.files.items()}
    return _Part(folder, names, checks, {})


def _checked(parts: Iterable[_Part], progress: Progress) -> dict[Path, str | None]:
    """The problem with each file that has a hash; None if it is intact."""
    checks = {file: check for part in parts for file, check in part.checks.items()}
    progress("verify", 0, len(checks))
    checked: dict[Path, str | None] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for file, problem in zip(checks, pool.map(lambda call: call(), checks.values()), strict=True):
            checked[file] = problem
            progress("verify", len(checked), len(checks))
    return checked | {file: problem for part in parts for file, problem in part.problems.items()}


def _problem(path: Path) -> str | None:
    try:
        if path.is_symlink():
            raise damaged(path, "a symbolic link where a file should be")
        check(path)
    except SaeError as error:
        return str(error)
    return None


def _contradictions(folder: Path, names: list[str]) -> Iterator[str]:
    """Problems with intact files: they cannot be read, or contradict each other."""
    if any((folder / name).is_symlink() for name in names):
        return
    readers = [
        ({CONFIG_FILE, WEIGHTS_FILE}, load),
        ({layout.INDEX}, Features),
        ({JSON_FILE, DOCUMENTS_FILE}, check_documents),
        ({CONFIG_YAML}, check_run),
    ]
    if circuit_tracer.layers_in(folder):
        readers.pop()  # a set of transcoders, whose settings have the name of a run's
    for files, read in readers:
        if files <= set(names):
            try:
                read(folder)
            except SaeError as error:
                yield str(error)
