"""Progress of a command: bars on a terminal, plain lines if standard error is a file or a pipe."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from sae.config.progress import Progress as Reported
from sae.config.progress import silent
from sae.console.terminal import Terminal, complain, errors, showing
from sae.files.printable import printable

EVERY = 30.0
"""Seconds between two lines of a stage in a log."""


@dataclass
class _Stage:
    """The current stage. Work done before this process started it does not count towards its rate."""

    name: str
    unit: str
    total: int
    first: int
    began: float
    done: int = 0
    note: str = ""

    def rate(self, now: float) -> float | None:
        """Units per second in this process."""
        seconds = now - self.began
        return (self.done - self.first) / seconds if self.done > self.first and seconds > 0 else None

    def left(self, now: float) -> float | None:
        """Estimated seconds until the end."""
        rate = self.rate(now)
        return (self.total - self.done) / rate if rate else None


@contextlib.contextmanager
def progress_bars(
    *, quiet: bool = False, units: Mapping[str, str] | None = None, every: float = EVERY
) -> Iterator[Reported]:
    """A function (stage, done, total) that shows the progress of each stage on standard error.

    The first call of a stage gives its starting point: 0, or the amount that an earlier process did. Rates count only
    later work. A stage ends when the next one starts. On a terminal a stage is a bar. Elsewhere it is a line at its
    start, one every half minute, and one at its end. A stage with a total of 1 is one piece of work, such as loading a
    model.

    Args:
        quiet: show nothing.
        units: the unit of each stage that does not count tokens.
        every: seconds between lines.
    """
    if quiet:
        yield silent
        return
    terminal, units = errors(), units or {}
    with showing(terminal), _Bars(terminal, units) if terminal.is_terminal else _Lines(units, every) as stages:
        yield stages


class _Stages(contextlib.AbstractContextManager["_Stages"]):
    """Shared by bars and lines: the current stage and its progress. At an error, the current stage is left as it is."""

    def __init__(self, units: Mapping[str, str]) -> None:
        self.units = units
        self.stage: _Stage | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.stage is None or self.stage.name != stage:
            self.end()
            unit = self.units.get(stage, "tokens" if total != 1 else "")
            self.stage = _Stage(stage, unit, total, done, time.monotonic(), done)
            self.begun(self.stage)
            return
        self.stage.done, self.stage.total = done, total
        self.moved(self.stage)
        if not self.stage.unit and done >= total:  # the work after a single piece may be silent for long
            self.end()

    def beside(self, stage: str, text: str) -> None:
        """Show a short note next to a stage, such as the current error."""
        if self.stage is not None and self.stage.name == stage:
            self.stage.note = text
            self.moved(self.stage)

    def announce(self, text: str) -> None:
        """Print a line before the next stage."""
        self.end()
        complain(text)

    def end(self) -> None:
        """End the current stage, which may have stopped short of a last partial batch."""
        if self.stage is not None:
            self.stage.done = self.stage.total
            self.ended(self.stage)
        self.stage = None

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:
            self.end()

    def begun(self, stage: _Stage) -> None:
        """Called when a stage begins."""

    def moved(self, stage: _Stage) -> None:
        """Called when more of a stage is done, or its note is another."""

    def ended(self, stage: _Stage) -> None:
        """Called when a stage ends."""


class _Lines(_Stages):
    """Plain lines for a log: at the start and the end of a stage, and by the clock in between."""

    def __init__(self, units: Mapping[str, str], every: float) -> None:
        super().__init__(units)
        self._lock, self._over, self._every = threading.RLock(), threading.Event(), every
        self._clock: threading.Thread | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            super().__call__(stage, done, total)

    def begun(self, stage: _Stage) -> None:
        before = f", {stage.first:,} of {stage.total:,} already done" if stage.first else ""
        size = f": {stage.total:,} {stage.unit}" if stage.unit else ""
        complain(f"{stage.name}{size}{before}")
        if self._clock is None:
            self._clock = threading.Thread(target=self._tick, daemon=True)
            self._clock.start()

    def ended(self, stage: _Stage) -> None:
        now = time.monotonic()
        rate = stage.rate(now)
        speed = f" ({rate:,.0f} {stage.unit}/s)" if rate and stage.unit else ""
        note = f"; {stage.note}" if stage.note else ""
        complain(f"{stage.name}: done in {_clock(now - stage.began)}{speed}{note}")

    def __exit__(self, error: object, *_: object) -> None:
        with self._lock:
            self._over.set()
            if self.stage is not None and error is not None:
                complain(f"{self.stage.name}: stopped at {self.stage.done:,} of {self.stage.total:,}")
            super().__exit__(error)

    def _tick(self) -> None:
        while not self._over.wait(self._every):
            with self._lock:
                if self.stage is not None and not self._over.is_set():
                    complain(_line(self.stage, time.monotonic()))


def _line(stage: _Stage, now: float) -> str:
    """The progress of a stage, as a line for a log."""
    if not stage.unit:
        return f"{stage.name}: {_clock(now - stage.began)}"
    rate, left = stage.rate(now), stage.left(now)
    speed = f"{rate:,.0f} {stage.unit}/s" if rate else ""
    rest = f"{_clock(left)} left" if left is not None else ""
    parts = (f"{stage.done:,} of {stage.total:,} {stage.unit}", speed, rest, stage.note)
    return f"{stage.name}: {', '.join(filter(None, parts))}"


class _Bars(_Stages):
    """A bar for each stage."""

    def __init__(self, terminal: Terminal, units: Mapping[str, str]) -> None:
        super().__init__(units)
        about_stage = (_done, _rate, _left, _note) if terminal.width >= 60 else (_rate, _left, _note)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12 if terminal.width < 100 else 32),
            *map(_StageColumn, about_stage),
            console=terminal,
            refresh_per_second=4,
        )
        self._task: TaskID | None = None

    def begun(self, stage: _Stage) -> None:
        self._bars.start()  # with the first stage: an unused display would leave an empty line
        total = stage.total if stage.unit else None  # one piece of work: a bar that moves until it is done
        self._task = self._bars.add_task(printable(stage.name), total=total, completed=stage.done, stage=stage)

    def moved(self, stage: _Stage) -> None:
        if self._task is not None and stage.unit:
            self._bars.update(self._task, completed=stage.done, total=stage.total)

    def ended(self, stage: _Stage) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=stage.total, total=stage.total)

    def __exit__(self, error: object, *_: object) -> None:
        super().__exit__(error)
        if self._bars.live.is_started:
            self._bars.stop()


class _StageColumn(ProgressColumn):
    """A column about the stage of a task, with a function that gives its text."""

    def __init__(self, text: Callable[[Task, _Stage], str]) -> None:
        super().__init__()
        self.text = text

    def render(self, task: Task) -> Text:
        return Text(printable(self.text(task, task.fields["stage"])), style="cyan", no_wrap=True, overflow="ellipsis")


def _done(_: Task, stage: _Stage) -> str:
    return f"{stage.done:,}/{stage.total:,}" if stage.unit else ""


def _rate(task: Task, stage: _Stage) -> str:
    seconds = task.finished_time or task.elapsed
    rate = (stage.done - stage.first) / seconds if seconds and stage.unit else 0
    return f"{rate:,.0f} {stage.unit}/s" if rate else ""


def _left(task: Task, stage: _Stage) -> str:
    """Time left, or the time taken once the stage is done."""
    seconds = task.finished_time if task.finished else stage.left(time.monotonic())
    if seconds is None and not stage.unit:
        seconds = task.elapsed
    return "" if seconds is None else _clock(seconds)


def _note(_: Task, stage: _Stage) -> str:
    return stage.note


def _clock(seconds: float) -> str:
    """`1:02:03`, or `25 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    return f"{rounded} s" if rounded < 60 else f"{rounded // 3600}:{rounded // 60 % 60:02d}:{rounded % 60:02d}"
