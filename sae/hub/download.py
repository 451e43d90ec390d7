"""Downloads the files of one dictionary from the hub into its cache: checked, resumed, of one commit."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sae.errors import FormatError, SaeError
from sae.files import version
from sae.files.hub_errors import explain_hub_error, first_line
from sae.files.paths import expanded
from sae.files.temporary import temporary_file
from sae.hub.layouts import Found, find
from sae.hub.names import HubName, parse_name
from sae.hub.snapshots import check_content

_COMMIT = re.compile(r"[0-9a-f]{40}")
_RESUMED = 1 << 20
"""Bytes from which a file's download is resumed by a later command; smaller ones begin again."""
_LISTED = 4
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EMFILE)


def located(name: str | Path) -> Path:
    """The folder or file on this machine that a name stands for, after a download if it is a name of the hub.

    Args:
        name: a path, or what `sae.hub.parse_name` reads.

    Returns:
        A path as it is, whether or not something is there; for a dictionary of the hub, its place in the hub's cache.
        Only its own files are downloaded, all of the same commit, and each is compared with the hash that the hub gives
        for it. In the hub's offline mode, they are taken from the cache.

    Raises:
        FormatError: the hub does not give it, or there is not exactly one dictionary at that name.
        DamagedError: a file differs from its hash.
    """
    known = parse_name(name)
    return expanded(name) if known is None else _download(known)


@contextlib.contextmanager
def hub_errors(name: HubName) -> Iterator[None]:
    """Turn what the hub's library raises into one line with the way out.

    Raises:
        FormatError: the library raised something.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise FormatError(
            f"dictionary {str(name)!r}: names of the hub need huggingface_hub: pip install 'sae[hub]'"
        ) from error
    try:
        yield
    except SaeError:
        raise
    except Exception as error:
        if is_local(error):
            from huggingface_hub import constants

            cache = f"the hub's cache is {constants.HF_HUB_CACHE!r}; HF_HOME names another place"
            reason = f"on this machine: {first_line(error)} ({cache})"
        else:
            reason = explain_hub_error(error, name.repository, "dictionary", "")
        raise FormatError(f"dictionary {str(name)!r}: {reason}") from error


def is_local(error: BaseException) -> bool:
    """Whether an error is of a file or a disk of this machine, and not of the hub or the network."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in _LOCAL_ERRORS)


def commit_of(name: HubName) -> str:
    """The commit of a name's revision: as the hub has it now, or in offline mode as the cache has it.

    Raises:
        FormatError: neither knows it.
    """
    if _COMMIT.fullmatch(name.revision):
        return name.revision
    with hub_errors(name):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import OfflineModeIsEnabled

        reference = _storage(name) / "refs" / name.revision
        if constants.HF_HUB_OFFLINE:
            if (commit := _read(reference)) is None:
                raise OfflineModeIsEnabled("not in the cache")
            return commit
        commit = str(HfApi(**_library()).model_info(name.repository, revision=name.revision).sha)
        if not _COMMIT.fullmatch(commit):
            raise FormatError(f"dictionary {str(name)!r}: the hub gives {commit[:60]!r} where a commit was expected")
        if _read(reference) != commit:
            with contextlib.suppress(OSError, SaeError):  # a cache that may not be written
                _write(reference, commit)
        return commit


def _read(reference: Path) -> str | None:
    """The commit in a file of the cache; None if there is none."""
    try:
        commit = reference.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _write(reference: Path, commit: str) -> None:
    """Write a commit to a file of the cache, which other processes see before or after it."""
    reference.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(reference) as (temporary, descriptor):
        os.write(descriptor, commit.encode())
        temporary.replace(reference)


def files_of(name: HubName, commit: str, folder: str = "", *, below: bool = True) -> dict[str, int]:
    """Paths and sizes in bytes of the files of a repository in a folder, at a commit; empty if there is no such folder.

    Args:
        name: of the repository.
        commit: as `commit_of` gives it.
        folder: path in the repository.
        below: with those in its subfolders.

    Raises:
        FormatError: the hub does not give them.
    """
    with hub_errors(name):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        try:
            tree = HfApi(**_library()).list_repo_tree(name.repository, folder or None, recursive=below, revision=commit)
            return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        except EntryNotFoundError:
            return {}


def fetch(name: HubName, commit: str, files: tuple[str, ...]) -> Path:
    """Download files of a repository that are not in the cache yet, in this order, and check all of them.

    Returns:
        The folder in the cache that has them, at their paths in the repository.

    Raises:
        FormatError: the hub does not give them, or a path leads out of the folder.
        DamagedError: one differs from its hash.
    """
    if outside := next((file for file in files if {"", ".", ".."} & set(file.split("/"))), None):
        raise FormatError(f"dictionary {str(name)!r}: the path {outside!r} leads out of the repository; it is not read")
    snapshot = _storage(name) / "snapshots" / commit
    for file in files:
        if not (snapshot / file).exists():
            with hub_errors(name):
                from huggingface_hub import hf_hub_download

                _download_content(name, commit, file)
                hf_hub_download(name.repository, file, revision=commit, **_library())
        check_content(snapshot / file)
    return snapshot


def _download(name: HubName) -> Path:
    commit = commit_of(name)
    found = _one_of(name, commit)
    return fetch(name, commit, found.files) / found.place


def _one_of(name: HubName, commit: str) -> Found:
    """The dictionary that a name stands for.

    Raises:
        FormatError: there is none, or there are several.
    """
    with hub_errors(name):
        from huggingface_hub import constants
        from huggingface_hub.errors import OfflineModeIsEnabled

        offline = constants.HF_HUB_OFFLINE
        files = _cached(_storage(name) / "snapshots" / commit, name.path) if offline else _listed(name, commit)
        found = find(files, name.path)
        if offline and not found:
            raise OfflineModeIsEnabled("not in the cache")
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(repr(str(name.at(one.place))) for one in found[:_LISTED])
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise FormatError(f"dictionary {str(name)!r}: there are {len(found)}, give one of them: {shown}{more}")
    beside = ", ".join(files[:_LISTED]) or "nothing"
    raise FormatError(
        f"dictionary {str(name)!r}: the hub has {name.repository!r}, but no dictionary at {name.path or 'its top'!r} "
        f"(found: {beside}); 'sae list {name.repository}' shows those that it has"
    )


def _listed(name: HubName, commit: str) -> list[str]:
    """Files at or below the name's path, and those in the folders above that a dictionary there may need."""
    files = files_of(name, commit, name.path)
    if not name.path:
        return list(files)
    beside = files_of(name, commit, name.path.rpartition("/")[0], below=False)
    return [*(file for file in files if file.startswith(f"{name.path}/")), *beside]


def _cached(snapshot: Path, path: str) -> list[str]:
    """Files of a commit in the cache."""
    above = (snapshot / path).parent if path else snapshot
    below = [Path(folder, file) for folder, _, files in os.walk(snapshot / path) for file in files]
    beside = [file for file in above.iterdir() if file.is_file()] if above.is_dir() else []
    return sorted({file.relative_to(snapshot).as_posix() for file in (*below, *beside) if file.exists()})


def _storage(name: HubName) -> Path:
    """The repository's folder in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{name.repository.replace('/', '--')}")


def _library() -> dict[str, Any]:
    return {"library_name": "sae", "library_version": version.__version__}


def _download_content(name: HubName, commit: str, file: str) -> None:
    """Download a large file's content into the cache, after the bytes that an earlier process has left there.

    The hub's library begins again in a new process. It is left to it if the file is small, if another process is
    downloading it, or if it comes from Xet, which the library can do if hf_xet is installed.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    from huggingface_hub.utils._runtime import is_xet_available

    url = hf_hub_url(name.repository, file, revision=commit)
    facts, headers = get_hf_file_metadata(url, **_library()), build_hf_headers(**_library())
    in_xet = facts.xet_file_data is not None and is_xet_available()
    if facts.size is None or facts.size < _RESUMED or not re.fullmatch(r"[0-9a-f]{40,64}", facts.etag or "") or in_xet:
        return
    content = _storage(name) / "blobs" / str(facts.etag)
    if content.exists():
        return
    location = facts.location if facts.xet_file_data is None else url  # which leads on to where Xet's files are whole
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)
    content.parent.mkdir(parents=True, exist_ok=True)
    partial = content.with_name(f"{content.name}.sae-partial")
    with partial.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        if content.exists():  # from another process
            partial.unlink(missing_ok=True)
            return
        if stream.tell() > facts.size:
            stream.truncate(0)
        http_get(location, stream, resume_size=stream.tell(), headers=headers, expected_size=facts.size)
        stream.flush()
        os.fsync(stream.fileno())
        partial.replace(content)
