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
    with contextlib.suppress(SaeError):  # the list cannot be read
        if SUMS in present and not is_users(folder):
            own |= {SUMS}
            own |= set(read_sums(folder))
    tokens = (folder / "tokens").glob("*.safetensors") if "tokens" in subfolders else ()
    if "manifest.json" in own or any(_SHARD.fullmatch(path.name) for path in tokens):
        own |= {"manifest.json", "documents.json"}  # a cache, whose manifest has the hash of the other
    if "config.yaml" in present and any((folder / name).is_file() for name in _IN_A_RUN):
        own |= {name for name in present if _FILES_OF_A_RUN.fullmatch(name)}
    if "config.yaml" in own:
        own |= {"metrics.jsonl"}  # not listed while it grows
    for files in _TOGETHER:
        own |= files if files <= present else set()
    return own & present
