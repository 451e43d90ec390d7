"""A dictionary in a common pass: its trainer, its sinks, its cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sae.training.checkpoint import CHECKPOINTS, list_checkpoints
from sae.training.meter import Meter, Stopwatch
from sae.training.sinks import Sink
from sae.training.trainer import Trainer


@dataclass(frozen=True)
class Cost:
    """Cost of one dictionary in a common pass.

    Attributes:
        seconds: time in its own steps, without reading.
        tokens: tokens it was trained on in this process.
        bytes: memory of weights and optimiser.
    """

    seconds: float
    tokens: int
    bytes: int


@dataclass
class Member:
    """One trainer with its sinks, meter and stopwatch."""

    trainer: Trainer
    sinks: list[Sink] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.meter, self.stopwatch = Meter(self.trainer.batch_size), Stopwatch(self.trainer.dictionary.W_dec.device)

    @property
    def folder(self) -> Path | None:
        return self.trainer.recipe.folder

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.folder / CHECKPOINTS) if self.folder else []

    @property
    def keep(self) -> int:
        return self.trainer.settings.keep_checkpoints

    def cost(self) -> Cost:
        return Cost(self.stopwatch.seconds(), self.tokens, self.trainer.bytes())


def weights_bytes(member: Member) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in member.trainer.dictionary.parameters())


def checkpoint_bytes(member: Member) -> int:
    """Size of a state and of the dictionary next to it; 0 if none is written."""
    return 0 if member.folder is None else weights_bytes(member) + member.trainer.bytes()
