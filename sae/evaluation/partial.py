"""Sums of an interrupted evaluation, stored next to the report under a hash of everything that determines them."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sae.errors import DamagedError
from sae.evaluation.metrics import METRICS
from sae.files import version
from sae.files.formats import fingerprint_of
from sae.files.reading import load_tensors
from sae.files.sums import recorded
from sae.files.writing import stands, write_tensors

FOLDER = "evaluation-unfinished"
EVERY = 5.0
"""Seconds between two writes of a stage's sums: the most that a kill costs."""
NOTHING: Mapping[str, Any] = MappingProxyType({})
_DONE = "done"


@runtime_checkable
class Summed(Protocol):
    """Running sums that can be stored and restored, to the last bit."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Unfinished:
    """Stored sums of an evaluation until its report is written; those of another evaluation are deleted.

    Args:
        folder: for the sums; None: nothing is stored.
        decides: everything that the numbers depend on.
        every: seconds between two writes of a stage; None: `EVERY`.
    """

    def __init__(
        self, folder: Path | None = None, decides: Mapping[str, Any] = NOTHING, every: float | None = None
    ) -> None:
        self.every = EVERY if every is None else every
        software = {"sae": version.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
        facts = {**decides, **software, "metrics": list(METRICS)}
        key = fingerprint_of(facts, default=str)[:32]
        self.folder = None if folder is None else folder / key
        if folder is not None and folder.is_dir():
            for other in folder.iterdir():
                if other.name != key:
                    shutil.rmtree(other, ignore_errors=True)

    def stage(self, name: str, sums: Mapping[str, Summed]) -> Stage:
        """A stage that adds to these sums, which continue from those stored for it."""
        path = None if self.folder is None else self.folder / f"{name.replace(' ', '-')}.safetensors"
        return Stage(path, sums, self.every)


class Stage:
    """One pass, in steps of a fixed order.

    Attributes:
        done: number of steps that the sums include.
    """

    def __init__(self, path: Path | None, sums: Mapping[str, Summed], every: float) -> None:
        self.path, self.sums, self.every = path, sums, every
        self._written, self.done = time.monotonic(), 0
        state = None if path is None else _read(path)
        if state is not None:
            for name, summed in sums.items():
                summed.load_state_dict(_part(state, name))
            self.done = int(state[_DONE])

    def step(self, done: int) -> None:
        """Record that this many steps are done; from time to time, write their sums."""
        self.done = done
        if time.monotonic() - self._written >= self.every:
            self.keep()

    def keep(self) -> None:
        """Write the sums."""
        if self.path is None:
            return
        state = {_DONE: torch.tensor(self.done)}
        for name, summed in self.sums.items():
            state |= {f"{name}/{key}": value.contiguous() for key, value in summed.state_dict().items()}
        write_tensors(self.path, state)
        self._written = time.monotonic()


def discard(folder: Path) -> None:
    """Delete the stored sums, when the report is written."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> dict[str, Tensor] | None:
    """The stored sums; if they are damaged or have no hash, all sums of the evaluation are deleted."""
    if not stands(path):
        return None
    with contextlib.suppress(DamagedError):
        if recorded(path):
            return load_tensors(path)
    discard(path.parent)
    return None


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.partition("/")[2]: value for key, value in state.items() if key.partition("/")[0] == name}
