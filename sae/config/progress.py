"""Callbacks that report the progress of long computations."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable
from typing import Protocol, runtime_checkable

Progress = Callable[[str, int, int], None]
"""Called with a stage, the amount done and the total: in tokens, unless documented otherwise."""
StageProgress = Callable[[int, int], None]
"""Called with the amount done and the total."""


def silent(*_: object) -> None:
    """Progress that is not shown."""


def within(progress: Progress, stage: str) -> StageProgress:
    """Progress of one stage."""
    return lambda done, total: progress(stage, done, total)


def under(progress: Progress, prefix: str) -> Progress:
    """Progress whose stages begin with a prefix."""
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)


def import_tqdm() -> None:
    """Import tqdm as other libraries do, but without its warning in notebooks that ipywidgets is not installed.

    Bars of these libraries are text there. Called before the libraries are imported.
    """
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.filterwarnings("ignore", message="IProgress not found")
        importlib.import_module("tqdm.auto")


@runtime_checkable
class Notes(Protocol):
    """Progress that also shows short texts: next to a stage, or before one begins."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def beside(self, stage: str, text: str) -> None: ...

    def announce(self, text: str) -> None: ...


def announce(progress: Progress, *lines: str) -> None:
    """Show lines before the next stage, if progress is shown; with `--quiet` it is not."""
    if isinstance(progress, Notes):
        for line in lines:
            progress.announce(line)
