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
from sae.errors import TrainingError
from sae.files import write_bytes

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
        (old / STATE_FILE).unlink()
    for other in folder.iterdir():
        if _NAME.fullmatch(other.name) and not (other / STATE_FILE).is_file():
            shutil.rmtree(other)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()]
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
        TrainingError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path / STATE_FILE) as archive:
            if wrong := archive.testzip():  # which PyTorch does not look at
                raise ValueError(f"the checksum of {wrong} is wrong")
        return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainingError(
            f"checkpoint {str(path)!r}: damaged ({error}); delete it, and training goes on from the one before"
        ) from error
