"""Publishes a dictionary on the hub: our files, SAELens's next to them, its report, and a page that shows them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from sae.config.file import CONFIG_YAML
from sae.dictionary.base import CONFIG_FILE, WEIGHTS_FILE, Dictionary
from sae.dictionary.saved import weights_sha256
from sae.errors import ConfigError, FormatError, SaeError
from sae.evaluation.report import FIGURE_FOLDER, REPORT
from sae.evaluation.report import JSON_FILE as REPORT_FILE
from sae.features import Features
from sae.features.layout import INDEX
from sae.features.store import store_of
from sae.files import version
from sae.files.damage import SUMS
from sae.files.hashes import check
from sae.files.hub_errors import explain_hub_error, first_line
from sae.files.paths import expanded
from sae.files.writing import stands
from sae.formats import WRITERS, load
from sae.hub import HubName, Snapshot, located, missing, parse_name, parse_repository
from sae.hub.download import is_local
from sae.hub.layouts import dictionaries_in
from sae.runs.card import MARK, Content, card, index
from sae.runs.folder import DICTIONARY

PAGE, FIGURE = "README.md", "density.png"
_SAELENS = "saelens"
_REPLACED = ("cfg.json", "sae_weights.safetensors", REPORT_FILE, FIGURE, SUMS)
"""Files that `push` writes for some dictionaries only: those of the dictionary that was at the path are deleted."""


@dataclass(frozen=True)
class Publication:
    """What was uploaded.

    Attributes:
        name: what `sae.load` takes now.
        url: of the page.
        commit: that has the files.
        files: their paths in the repository.
        notes: what the reader should know, a sentence each.
    """

    name: str
    url: str
    commit: str
    files: tuple[str, ...]
    notes: tuple[str, ...]


def push(
    dictionary: Dictionary | str | Path, name: str, *, private: bool = False, licence: str | None = None
) -> Publication:  # fmt: skip
    """Upload a dictionary to the hub, in one commit; the repository is created if there is none.

    If `push` has uploaded another dictionary to the same path, it is replaced: its files that the new one has not are
    deleted in the same commit. Pages that `push` did not write stay as they are.

    Uploaded are our two files with their hashes; SAELens's next to them, if it has the architecture; from a run folder
    `eval.json` with a figure; and `README.md`, with the report, ten features of the feature store, and how to load the
    dictionary. The hub's library has the token (`HF_TOKEN`, or `hf auth login`).

    Args:
        dictionary: a dictionary, its folder, or a run folder.
        name: `organisation/repository`, with `:path` for a folder in it; without, the folder is called as the hook
            point. With `@branch`, it is uploaded there.
        private: a new repository is private; an existing public one is refused.
        licence: name of the licence, such as `mit`, for the page; None: none is stated.

    Raises:
        ConfigError: the name is no name of a repository, or that is public.
        FormatError: the dictionary cannot be read, or the hub refuses it, or another upload came first.
    """
    run = None if isinstance(dictionary, Dictionary) else _run_of(expanded(dictionary))
    loaded = dictionary if isinstance(dictionary, Dictionary) else load(dictionary)
    place = _place_of(name, loaded)
    with tempfile.TemporaryDirectory() as temporary, _hub_errors(place):
        from huggingface_hub import HfApi

        api = HfApi(library_name="sae", library_version=version.__version__)
        content, notes = _written(loaded, place, run, licence, Path(temporary))
        _create(api, place, private)
        return _upload(api, place, Path(temporary), content, notes)


def pull(name: str, folder: str | Path | None = None) -> Path:
    """Download a dictionary of the hub.

    Args:
        name: what `sae.load` takes.
        folder: where to write it in our format, with its repository, commit and what its release knows in its metadata;
            new or empty. None: only the hub's cache gets its files, so that they are there without a network.

    Returns:
        The folder, or the dictionary's place in the hub's cache.

    Raises:
        ConfigError: the folder has files.
        FormatError: the hub does not give it.
    """
    if parse_name(name) is None and not os.path.lexists(expanded(name)):
        raise missing(name, "unknown; give")
    target = None if folder is None else expanded(folder)
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{str(folder)!r}: already there; give a new folder")
    place = located(name)
    if Snapshot.of(place) is None:
        raise ConfigError(f"{name!r}: is on this machine already; 'sae convert' writes it to another folder")
    if target is None:
        return place
    _save(load(place), target)
    return target


def _save(dictionary: Dictionary, folder: Path) -> None:
    """Write a dictionary to a folder, which a killed process does not leave half written.

    The files are written next to it, to a folder that a killed process may have left.
    """
    place = folder.resolve()
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dictionary.save(partial)
    if not place.exists():
        partial.rename(place)
        return
    for name in (WEIGHTS_FILE, SUMS, CONFIG_FILE):
        if (partial / name).exists():
            shutil.move(partial / name, place / name)
    shutil.rmtree(partial)


def _place_of(name: str, dictionary: Dictionary) -> HubName:
    """The repository and the folder in it.

    Raises:
        ConfigError: the name is no name of a repository.
    """
    place = parse_repository(name)
    if place is None:
        raise ConfigError(f"{name!r}: expected ORGANISATION/REPOSITORY, with :PATH if wanted")
    origin = dictionary.origin
    hooks = dict.fromkeys(hook for hook in (origin.reads.hook, origin.gives.hook) if hook)
    return place if place.path or not hooks else replace(place, path="-to-".join(hooks))


def _run_of(folder: Path) -> Path | None:
    """The run folder that a path is, or that it is the dictionary of."""
    places = (folder, folder.parent if folder.name == DICTIONARY else folder)
    return next((place for place in places if stands(place / CONFIG_YAML)), None)


def _create(api: Any, place: HubName, private: bool) -> None:
    api.create_repo(place.repository, private=private or None, exist_ok=True)
    if private and not api.model_info(place.repository).private:
        raise ConfigError(
            f"{place.repository!r}: a public repository already; make it private on its page, or leave --private out"
        )


def _written(
    dictionary: Dictionary, place: HubName, run: Path | None, licence: str | None, folder: Path
) -> tuple[Content, list[str]]:  # fmt: skip
    """Write everything but the pages to a folder; what the page shows, and notes."""
    notes: list[str] = []
    dictionary.save(folder)
    for_saelens, lost = True, []
    try:
        lost = WRITERS[_SAELENS](dictionary, folder)
    except FormatError as error:
        for_saelens = False
        notes.append(f"without files for SAELens: {error}")
    report, features = None, None
    if run is not None:
        weights = weights_sha256(dictionary)
        report, features = _report(run, weights, folder, notes), _features(run, weights, notes)
    has_figure = (folder / FIGURE).exists()
    if licence is None:
        notes.append("no licence is stated: --licence NAME (licence=... in Python) states one")
    if paths := sorted({*_paths_in(dictionary.metadata), *_paths_in(report)}):
        notes.append(f"the files name places on this machine: {', '.join(map(repr, paths))}")
    content = Content(dictionary, place, report, features, FIGURE if has_figure else None, licence, for_saelens, lost)
    return content, notes


def _report(run: Path, weights: str, folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """The run's report, if it is of this dictionary; it is copied, with its figure."""
    path, figure = run / REPORT_FILE, run / FIGURE_FOLDER / FIGURE
    if not stands(path):
        return None
    record = REPORT.read(run, f"report {str(path)!r}")
    if record.get("dictionary", {}).get("weights_sha256") != weights:
        notes.append(f"without {REPORT_FILE}, which is of other weights: 'sae eval' makes it anew")
        return None
    (folder / REPORT_FILE).write_bytes(path.read_bytes())
    if stands(figure):
        check(figure)
        (folder / FIGURE).write_bytes(figure.read_bytes())
    return record


def _features(run: Path, weights: str, notes: list[str]) -> Features | None:
    folder = run / "features"
    features = store_of(folder, weights)
    if features is None and stands(folder / INDEX):
        notes.append("without features: the feature store is of other weights; 'sae features' makes it anew")
    return features


def _paths_in(value: Any) -> Iterator[str]:
    """Texts in metadata that are absolute paths."""
    if isinstance(value, str) and value.startswith(("/", "~")):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        yield from _paths_in(part)


def _upload(api: Any, place: HubName, folder: Path, content: Content, notes: list[str]) -> Publication:
    """Upload a folder's files and the pages in one commit, on top of the commit whose files were looked at."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = str(api.model_info(place.repository, revision=place.revision).sha)
    there = set(api.list_repo_files(place.repository, revision=head))
    files: dict[str, Path | bytes] = {
        _inside(place, path.name): path for path in sorted(folder.iterdir()) if path.is_file()
    }
    replaced = _replaced(place, there) - files.keys()
    if {_inside(place, CONFIG_FILE), _inside(place, WEIGHTS_FILE)} & there:
        notes.append(f"replaces the dictionary that was there, which commit {head[:12]} still has")
    if replaced:
        notes.append(f"deleted, since they were of the dictionary that was there: {', '.join(sorted(replaced))}")
    files |= _pages(api, place, head, content, there, (there | files.keys()) - replaced, notes)
    operations = [
        *(CommitOperationDelete(path) for path in sorted(replaced)),
        *(
            CommitOperationAdd(path, str(source) if isinstance(source, Path) else source)
            for path, source in files.items()
        ),
    ]
    done = api.create_commit(
        place.repository, operations, commit_message=f"Add {place.path or 'a dictionary'}", revision=place.revision,
        parent_commit=head,
    )  # fmt: skip
    url = f"{api.endpoint}/{place.repository}"
    return Publication(str(place), url, str(done.oid), tuple(sorted(files)), tuple(notes))


def _inside(place: HubName, name: str) -> str:
    """Path of a file in the dictionary's folder."""
    return f"{place.path}/{name}" if place.path else name


def _replaced(place: HubName, there: Collection[str]) -> set[str]:
    """Files in the repository that belong to a dictionary which `push` has uploaded to the same path."""
    if not {_inside(place, CONFIG_FILE), _inside(place, WEIGHTS_FILE)} <= set(there):
        return set()
    return {_inside(place, name) for name in _REPLACED} & set(there)


def _pages(
    api: Any,
    place: HubName,
    head: str,
    content: Content,
    there: Collection[str],
    files: Collection[str],
    notes: list[str],
) -> dict[str, bytes]:
    """The page of the dictionary, and that of the repository, which lists its dictionaries if there are several.

    Args:
        api: the hub's.
        place: of the dictionary.
        head: the commit before the upload.
        content: what the page of the dictionary shows.
        there: the commit's files.
        files: those after the upload.
        notes: one is added for each page that stays as it is.
    """
    own = [one.place for one in dictionaries_in(files).values() if PurePosixPath(one.files[-1]).name == WEIGHTS_FILE]
    top = card(content, place.path) if own == [place.path] else index(place, own, content)
    pages = {_inside(place, PAGE): card(content), PAGE: top}
    for path in pages.keys() & set(there):
        if not _is_own_page(api, place, head, path):
            whose = "the repository's " if path == PAGE else ""
            notes.append(f"{whose}{path} was not written by sae, and stays as it is")
            del pages[path]
    return {path: page.encode() for path, page in pages.items()}


def _is_own_page(api: Any, place: HubName, head: str, path: str) -> bool:
    """Whether a page may be written again: ours, or one that the hub made with the repository."""
    page = Path(api.hf_hub_download(place.repository, path, revision=head)).read_text("utf-8", "replace")
    return MARK in page or page.strip() in ("", "---\n---")


@contextlib.contextmanager
def _hub_errors(place: HubName) -> Iterator[None]:
    """Turn what the hub's library raises into one line with the way out.

    Raises:
        FormatError: the library raised something.
    """
    try:
        yield
    except SaeError:
        raise
    except ImportError as error:
        raise ConfigError(f"{str(place)!r}: uploads need huggingface_hub: pip install 'sae[hub]'") from error
    except Exception as error:
        reason = f"on this machine: {first_line(error)}" if is_local(error) else _reason(error, place)
        raise FormatError(f"upload to {str(place)!r}: {reason}") from error


def _reason(error: Exception, place: HubName) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "the hub's offline mode is on (HF_HUB_OFFLINE): unset it to upload"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return (
            f"the hub does not let you write to {place.repository!r} ({status or 'no token'}): set HF_TOKEN to a token "
            "that may write there, or run 'hf auth login'"
        )
    if status == 412:
        return f"another upload to {place.repository!r} came first (412): run the same command again"
    if isinstance(error, HfHubHTTPError) and status is not None and 400 <= status < 500 and status != 429:
        return f"the hub refuses it ({status}: {first_line(error)}); check the name and the revision"
    return explain_hub_error(error, place.repository, "dictionary", "")
