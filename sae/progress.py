"""Progress bars with speed and time left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

NO_UNITS: Mapping[str, str] = MappingProxyType({})


class _PerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        speed = task.completed / seconds if seconds else None
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="cyan")


@contextlib.contextmanager
def progress_bars(
    *, quiet: bool = False, units: Mapping[str, str] = NO_UNITS
) -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, tokens done, tokens in all) that keeps one bar a stage on the terminal's standard error.

    Args:
        quiet: no bars.
        units: what stages count, where that is not tokens.
    """
    if quiet:
        yield lambda stage, done, total: None
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        _PerSecond(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    tasks: dict[str, TaskID] = {}
    bars = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)

    def finish() -> None:
        """A stage ends where the next begins, though it may stop short of a last partial batch."""
        for task in tasks.values():
            bars.update(task, completed=bars.tasks[task].total)

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            finish()
            bars.start()  # with the first stage: bars that never were would leave an empty line
            tasks[stage] = bars.add_task(stage, total=total, unit=units.get(stage, "tokens"))
        bars.update(tasks[stage], completed=done, total=total)

    try:
        yield show
        finish()
    finally:
        if bars.live.is_started:
            bars.stop()
