"""Resumable training states on disk: each with the dictionary as it was, ready to use."""

from __future__ import annotations

import io
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from sae.config import TrainConfig
from sae.dictionary import Dictionary
from sae.files import delete, stands, write_bytes
from sae.hashes import check, damaged, recorded

STATE_FILE = "state.pt"
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], dictionary: Dictionary) -> Path:
    """Write `step-N/` under `folder`: the folded dictionary, then the state, whose presence makes it whole."""
    path = folder / f"step-{step:08d}"
    dictionary.save(path)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path / STATE_FILE, buffer.getvalue())
    return path


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`, and what a kill left half written."""
    for old in list_checkpoints(folder)[:-keep]:
        delete(old / STATE_FILE)
    for other in folder.iterdir():
        if _NAME.fullmatch(other.name) and not stands(other / STATE_FILE):
            shutil.rmtree(other)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and stands(path / STATE_FILE)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def snapshot_folder(folder: Path, tokens: int) -> Path:
    """Where a run folder keeps the dictionary as it was after so many training tokens."""
    return folder / SNAPSHOTS / f"tokens-{tokens:012d}"


def warn_of_missed_snapshots(folder: Path | None, settings: TrainConfig, batch_size: int, steps: int) -> None:
    """Say which snapshots cannot be made any more, since `steps` were taken before they were asked for."""
    for tokens in settings.snapshots:
        step = -(-tokens // batch_size)
        if folder is not None and step <= steps and not snapshot_folder(folder, step * batch_size).is_dir():
            warnings.warn(
                f"train.snapshots: training in {str(folder)!r} has passed {tokens:,} tokens, and no snapshot was asked "
                "for then: there will be none",
                stacklevel=3,
            )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state; nothing in it can run code.

    Raises:
        DamagedError: the file is damaged.
    """
    file = path / STATE_FILE
    check(file)
    try:
        if not recorded(file):
            with zipfile.ZipFile(file) as archive:
                if wrong := archive.testzip():  # which PyTorch does not look at
                    raise ValueError(f"the checksum of {wrong} is wrong")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise damaged(file, f"damaged ({error})") from error
    if not isinstance(state, dict) or not {"identity", "sources", "step"} <= state.keys():
        raise damaged(file, "damaged (it is no state of a training)")
    return state
