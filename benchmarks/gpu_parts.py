"""The parts of `benchmarks/gpu.py`: what each is, and what it is given when it runs, in a process of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report

Row = dict[str, Any]
"""What a part has found, with values that JSON can hold."""


class PartSkipped(Exception):  # noqa: N818
    """The part cannot run here, for the reason given."""


@dataclass(frozen=True)
class Context:
    """What a part is given.

    Attributes:
        device: `cuda`, or `cpu` for a dry run.
        dry: small shapes, and kernels in Triton's interpreter.
        seconds: how long the part may take; then it is stopped.
        folder: for what it writes, deleted afterwards.
        peers: folders of other toolkits, by name; may be empty.
        emit: called with the key of a finished row and the row, which is then safe; it replaces a row of that key.
        go: waits until nothing else uses the machine; what comes before it is not timed.
    """

    device: str
    dry: bool
    seconds: float
    folder: Path
    peers: Mapping[str, Path]
    emit: Callable[[str, Row], None]
    go: Callable[[], object]

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        title: its heading in the report.
        seconds: its share of nine minutes.
        module: where it is; it has a function of the part's name.
        view: the module whose `markdown` makes a table of its rows; it needs little to be imported.
        ahead: whether it starts before its turn, to compile while the part before it runs.
    """

    title: str
    seconds: float
    module: str
    view: str
    ahead: bool = False

    def run(self, name: str, context: Context) -> None:
        getattr(importlib.import_module(self.module), name)(context)

    def markdown(self, rows: Sequence[Row]) -> str:
        return importlib.import_module(self.view).markdown(rows)


PARTS = {
    "tests": Part("Tests", 75, "gpu_tests", "gpu_tests"),
    "steps": Part("Whole training steps, and the quality they give", 215, "gpu_steps", "gpu_steps", ahead=True),
    "selection": Part("Selection", 55, "gpu_selection", "gpu_selection"),
    "cached": Part("Training from a cache", 40, "gpu_roads", "gpu_parts"),
    "live": Part("Training from a running model", 40, "gpu_roads", "gpu_parts"),
    "harvest": Part("Harvest", 50, "gpu_model", "gpu_parts"),
    "features": Part("Feature pass", 20, "gpu_model", "gpu_parts"),
    "evaluation": Part("Evaluation", 35, "gpu_model", "gpu_parts"),
}
"""In order of value: what comes last is lost first when time runs out."""


def markdown(rows: Sequence[Row]) -> str:
    """A table of rows that each compare tokens per second with those of something else."""
    cells = [
        [
            row["what"], f"{row['tokens_per_second']:,.0f}", row.get("beside", "–"),
            f"{row['beside_tokens_per_second']:,.0f}" if "beside" in row else "–",
            f"{row['tokens_per_second'] / row['beside_tokens_per_second']:.3f}" if "beside" in row else "–",
        ]
        for row in rows
    ]  # fmt: skip
    return report.table(["what", "tokens/s", "compared with", "tokens/s", "ratio"], cells)
