"""Qwen-Scope: one file of tensors per layer, `layerN.sae.pt`, in a folder whose name gives the number of features."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sae.dictionary.hook_points import name_of
from sae.dictionary.published import published_entry
from sae.errors import FormatError
from sae.formats.foreign import Foreign
from sae.formats.foreign_files import Tensors, read_pickle

NAME = "qwen_scope"
TITLE = "Qwen-Scope"
_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_REPOSITORY = re.compile(r"SAE-Res-(.+?)-W(\d+)K-L0_(\d+)")


def find(path: Path) -> Path | None:
    """The file, which is the path itself; None if it is not one."""
    return path if _FILE.fullmatch(path.name) and path.is_file() else None


def read(path: Path) -> Foreign:
    """Read a dictionary; k and the model are in the repository's name, which has to be in the path.

    Raises:
        FormatError: the path does not have it.
        DamagedError: the file is damaged.
    """
    repository, layer = _REPOSITORY.search(path.absolute().as_posix()), _FILE.fullmatch(path.name)
    if repository is None or layer is None:
        raise FormatError(
            f"{str(path)!r}: how many features fire is only in the repository's name, SAE-Res-MODEL-W…K-L0_…: give a "
            "path that has it"
        )
    tensors = Tensors(path, read_pickle(path))
    W_enc = tensors.take("W_enc", None, None)
    d_sae, d_in = W_enc.shape
    W_dec, b_enc, b_dec = tensors.take("W_dec", d_in, d_sae), tensors.take("b_enc", d_sae), tensors.take("b_dec", d_in)
    tensors.end()
    metadata: dict[str, Any] = {
        "hook": name_of(int(layer[1]), "hook_resid_post"),
        "model": {"name": f"Qwen/{repository[1]}", "weight_processing": "none"},
        **published_entry(int(repository[3]), f"L0_{repository[3]} in the repository's name"),
    }
    return Foreign(
        "Qwen-Scope", "topk", W_enc.T, b_enc, W_dec.T, b_dec, centred=False, k=int(repository[3]), metadata=metadata
    )  # fmt: skip
