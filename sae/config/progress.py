"""How a caller is told how far a long computation is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is in all: tokens, unless something else is said."""
StageProgress = Callable[[int, int], None]
"""Called with how much is done, and how much there is in all."""


def silent(*_: object) -> None:
    """Progress that nobody is told of."""


def within(progress: Progress, stage: str) -> StageProgress:
    """Progress of one stage."""
    return lambda done, total: progress(stage, done, total)


def under(progress: Progress, prefix: str) -> Progress:
    """Progress whose stages begin with a prefix."""
    return lambda stage, done, total: progress(f"{prefix}: {stage}", done, total)


@runtime_checkable
class Notes(Protocol):
    """Progress that also takes a few words: beside a stage, or before one begins."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def beside(self, stage: str, text: str) -> None: ...

    def announce(self, text: str) -> None: ...


def announce(progress: Progress, *lines: str) -> None:
    """Say lines before what comes next, where progress is shown; with `--quiet` it is not."""
    if isinstance(progress, Notes):
        for line in lines:
            progress.announce(line)
