"""A dictionary in a common pass: its trainer, its sinks, its cost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.interface import Room
from sae.training.checkpoint import CHECKPOINTS, list_checkpoints
from sae.training.meter import Meter, Stopwatch
from sae.training.replay import Batches, Recorder, Replay
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
    """One trainer with its sinks, meter and stopwatch.

    Attributes:
        recorder: the pass's; None if no member's steps are replayed.
    """

    trainer: Trainer
    sinks: list[Sink] = field(default_factory=list)
    tokens: int = 0
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        self.meter, self.stopwatch = Meter(self.trainer.batch_size), Stopwatch(self.trainer.dictionary.W_dec.device)
        self._replay: Replay | None = None

    @property
    def is_replayed(self) -> bool:
        """Whether steps are recorded and replayed."""
        return self.trainer.is_replayable and self.trainer.settings.cuda_graph

    def step(self, raw: Float[Tensor, "batch d_in"], raw_target: Float[Tensor, "batch d_out"] | None) -> None:
        """Take a step; with a recorder, from tensors that are at the same place each time."""
        trainer = self.trainer
        with self.stopwatch:
            trainer.prepare(raw, raw_target)
            if self.recorder is not None and self.is_replayed:
                if self._replay is None:
                    self._replay = Replay(
                        self.recorder, self._compute, lambda: trainer.variant, trainer.optimizer.discard
                    )
                names = self._replay.step(raw, raw_target)
            else:
                names = self._compute(raw, raw_target)
            trainer.finish()
        self.meter.count(names)
        self.tokens += len(raw)

    def _compute(self, raw: Tensor, raw_target: Tensor | None, room: Room | None = None) -> tuple[str, ...]:
        losses = self.trainer.compute(raw, raw_target, room)
        return self.meter.sum(losses, self.trainer.variance)

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


def share_recorder(members: Collection[Member], device: torch.device) -> Batches | None:
    """Let the members of a pass replay their steps; returns where batches must be. None: no member's can be."""
    if not any(member.is_replayed for member in members):
        return None
    recorder = Recorder(device)
    for member in members:
        member.recorder = recorder
    return Batches()


def weights_bytes(member: Member) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in member.trainer.dictionary.parameters())


def checkpoint_bytes(member: Member) -> int:
    """Size of a state and of the dictionary next to it; 0 if none is written."""
    return 0 if member.folder is None else weights_bytes(member) + member.trainer.bytes()
