"""A folder's names in; those of files that this toolkit wrote out. They are not text, even if they are .md or .json.

Run folders often lie below the texts that they are made from. A file is the toolkit's if a `SHA256SUMS` of the toolkit
lists it. If there is no list, because the folder is incomplete after a kill or older than the lists, combinations of
names that occur only in such folders identify it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from pathlib import Path

from sae.errors import SaeError
from sae.files.damage import SUMS
from sae.files.sums import is_users, read_sums
from sae.files.temporary import is_leftover

_SHARD = re.compile(r"(train|held_out)-\d+\.safetensors")
_IN_A_RUN = ("activations/manifest.json", "dictionary/weights.safetensors")
_FILES_OF_A_RUN = re.compile(
    r"config\.yaml|metrics\.jsonl|cost\.json|(eval|probe|compare|effects[^/]*)\.(json|md)|"
    r"(eval-documents|effects[^/]*)\.safetensors"
)
_TOGETHER = (
    {"config.json", "weights.safetensors"},
    {"features.json", "features.safetensors", "tokens.safetensors", "documents.json", "vocabulary.json"},
)


def own_names(folder: Path, subfolders: Collection[str], names: Collection[str]) -> set[str]:
    """Names of the files in a folder that this toolkit wrote.

    Args:
        folder: its path.
        subfolders: names of the folders in it.
        names: all other names in it.
    """
    present = set(names)
    own = {name for name in present if is_leftover(name) and name != SUMS}
    own |= {name for name in present if _SHARD.fullmatch(name)}
    if SUMS in present and not _is_users(folder):
        own |= {SUMS, *_listed(folder)}
    if "manifest.json" in own or ("tokens" in subfolders and _has_shards(folder / "tokens")):
        own |= {"manifest.json", "documents.json"}  # a cache, whose manifest has the hash of the other
    if "config.yaml" in present and any((folder / name).is_file() for name in _IN_A_RUN):
        own |= {name for name in present if _FILES_OF_A_RUN.fullmatch(name)}
    if "config.yaml" in own:
        own |= {"metrics.jsonl"}  # not listed while it grows
    for files in _TOGETHER:
        own |= files if files <= present else set()
    return own & present


def _has_shards(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(_SHARD.fullmatch(path.name) for path in folder.iterdir())
    return False


def _is_users(folder: Path) -> bool:
    try:
        return is_users(folder)
    except SaeError:
        return True


def _listed(folder: Path) -> set[str]:
    try:
        return set(read_sums(folder))
    except SaeError:
        return set()
