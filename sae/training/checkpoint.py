"""Resumable training states on disk, each next to its dictionary, ready to use."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sae.config.settings import TrainConfig
from sae.dictionary.base import Dictionary
from sae.errors import FormatError
from sae.files.damage import damaged
from sae.files.hashes import check
from sae.files.sums import recorded
from sae.files.writing import delete, stands, write_bytes

STATE_FILE = "state.pt"
STATE_VERSION = 4
"""Version of the rules that no setting describes. Older checkpoints continue by their own. Version 1, which has no
version, has a scale from E‖x‖², a threshold that is a running mean, and a steering of its own; versions 1 and 2 leave
out no outliers; in versions 1 to 3, the b_dec of a transcoder is also subtracted from what it reads."""
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
_NAME = re.compile(r"step-(\d+)")
_SHARE_OF_TIME = 0.05
_LEAST_SECONDS = 60.0
_BYTES_PER_SECOND = 200e6


class CheckpointClock:
    """Decides when the states of a pass are written.

    With `every`, states are written at its multiples and at the end. Without it, writing takes at most a twentieth of
    the time, and a kill loses at most about twenty times the time of a write (or a minute). The next state is due when
    the time spent on writing, including the expected time of the next write, is at most a twentieth of the total, and
    a minute has passed since the last. The same rule, without the minute, holds for the state at the end: a training
    too short for it is soon repeated.

    Args:
        every: `train.checkpoint_every`.
        size: bytes of the states of all members, from which the time of the first write is estimated.
        clock: returns seconds.
    """

    def __init__(self, every: int | None, size: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self._clock = every, clock
        self._start = self._latest = clock()
        self._spent, self._expected = 0.0, size / _BYTES_PER_SECOND

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether to write after `step`; `last` if it is the last."""
        if self.every is not None:
            return last or step % self.every == 0
        now = self._clock()
        allowed = _SHARE_OF_TIME * (now - self._start)
        rested = last or now - self._latest >= _LEAST_SECONDS
        return rested and self._spent + self._expected <= allowed

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Time a write: states are written inside `with`."""
        before = self._clock()
        yield
        self._latest = self._clock()
        self._expected = self._latest - before
        self._spent += self._expected


def training_bytes(dictionary: int, optimizer: int, keep: int) -> int:
    """Disk space of a training: the newest `keep` checkpoints, the one written before the oldest is deleted, and the
    finished dictionary.

    Args:
        dictionary: bytes of the weights.
        optimizer: bytes of the weights in training and of the optimiser's state.
        keep: `train.keep_checkpoints`.
    """
    return (keep + 1) * (dictionary + optimizer) + dictionary


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], dictionary: Dictionary) -> Path:
    """Write `step-N/` under `folder`: the folded dictionary, then the state, whose presence makes it complete."""
    path = folder / f"step-{step:08d}"
    dictionary.save(path)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path / STATE_FILE, buffer.getvalue())
    return path


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`, and incomplete ones left by a kill."""
    for old in list_checkpoints(folder)[:-keep]:
        delete(old / STATE_FILE)
    for other in folder.iterdir():
        if _NAME.fullmatch(other.name) and not stands(other / STATE_FILE):
            shutil.rmtree(other)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and stands(path / STATE_FILE)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def snapshot_folder(folder: Path, tokens: int) -> Path:
    """Where a run folder keeps the dictionary after `tokens` training tokens."""
    return folder / SNAPSHOTS / f"tokens-{tokens:012d}"


def warn_of_missed_snapshots(folder: Path | None, settings: TrainConfig, batch_size: int, steps: int) -> None:
    """Warn of snapshots that can no longer be made, because they were not requested before `steps` were taken."""
    for tokens in settings.snapshots:
        step = -(-tokens // batch_size)
        if folder is not None and step <= steps and not snapshot_folder(folder, step * batch_size).is_dir():
            warnings.warn(
                f"train.snapshots: training in {str(folder)!r} has passed {tokens:,} tokens without a snapshot, since "
                "none was requested then: there will be none",
                stacklevel=3,
            )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state; nothing in it can run code.

    Raises:
        DamagedError: the file is damaged.
        FormatError: it has a newer version.
    """
    file = path / STATE_FILE
    check(file)
    try:
        if not recorded(file):
            with zipfile.ZipFile(file) as archive:
                if wrong := archive.testzip():  # PyTorch does not check these
                    raise ValueError(f"the checksum of {wrong} is wrong")
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise damaged(file, f"damaged ({error})") from error
    if not isinstance(state, dict) or not {"identity", "sources", "step"} <= state.keys():
        raise damaged(file, "damaged (it is not a training state)")
    version = state.get("version", 1)
    if type(version) is int and version > STATE_VERSION:
        raise FormatError(
            f"checkpoint {str(path)!r}: version {version} of the training state is newer than this package reads "
            f"({STATE_VERSION}); update the package, or delete the checkpoint to train without it"
        )
    return state
