"""Reads a common pass: a batch of every source per step, and batches of coming steps ahead of time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import TrainingError
from sae.training.recipe import Recipe
from sae.training.source import BatchSource, IterableSource, StoppableSource


@dataclass(frozen=True)
class _Read:
    """A batch of every source, and the sources' places after it."""

    batch: dict[str, Float[Tensor, "batch d_in"]]
    places: dict[str, dict[str, Any]]


class Reader:
    """Reads batches of several sources, in which equal rows belong to the same tokens.

    Args:
        sources: sources by name.
        device: where batches go.
        callers_mode: the caller's PyTorch modes, which apply to the sources, because one may run a language model.
    """

    def __init__(
        self, sources: Mapping[str, BatchSource], device: torch.device,
        callers_mode: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self.sources, self.device, self.callers_mode = sources, device, callers_mode
        self._count = 0
        self._ahead: deque[_Read] = deque()
        self._places: dict[str, dict[str, Any]] | None = None  # at the newest step; None: the sources' own
        self._unreadable: Exception | None = None
        self._batches: Iterator[tuple[Tensor, ...]] = iter(())

    def begin(self, steps_done: int) -> None:
        """Start reading at the sources' places."""
        self._count, self._batches = steps_done, self._rows()

    def stop_when(self, stopped: Callable[[], bool]) -> None:
        """Let sources that compute for long ask whether to stop."""
        for source in self.sources.values():
            if isinstance(source, StoppableSource):
                source.stop_when(stopped)

    def _rows(self) -> Iterator[tuple[Tensor, ...]]:
        """A generator, so that sources are first asked for an iterator under the caller's modes."""
        yield from zip(*self.sources.values(), strict=False)

    def next(self) -> dict[str, Float[Tensor, "batch d_in"]] | None:
        """The next batch by source, float32 on the device; None if there is no more.

        Raises:
            TrainingError: the batches do not fit together.
        """
        if self._ahead:
            read = self._ahead.popleft()
            self._places = read.places
            return read.batch
        if self._unreadable is not None:
            raise self._unreadable
        self._places = None
        return self._read()

    def look_ahead(self, count: int) -> list[dict[str, Float[Tensor, "batch d_in"]]]:
        """The next `count` batches, or fewer at the end; `next` still returns them."""
        self._places = self._places or self._now()
        try:
            while self._unreadable is None and len(self._ahead) < count and (batch := self._read()) is not None:
                copies = {name: x.clone() for name, x in batch.items()}  # an iterable may reuse its buffer
                self._ahead.append(_Read(copies, self._now()))
        except Exception as error:  # raised when its step is due, if ever
            self._unreadable = error
        return [read.batch for read in self._ahead]

    def places_of(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """Places of a recipe's sources, by role: their names differ from pass to pass."""
        places = self._places or self._now()
        return {role: places[name] for role, name in recipe.sources.items()}

    def _read(self) -> dict[str, Float[Tensor, "batch d_in"]] | None:
        with self.callers_mode():
            parts = next(self._batches, None)
        if parts is None:
            return None
        batch = dict(zip(self.sources, parts, strict=True))
        self._count += 1
        for name, x in batch.items():
            if x.ndim != 2 or x.shape[1] != self.sources[name].d_in:
                raise TrainingError(f"a batch has shape {list(x.shape)}: expected [batch, {self.sources[name].d_in}]")
        epochs = {source.epoch for source in self.sources.values() if isinstance(source, IterableSource)}
        if len(epochs) > 1:
            raise TrainingError(
                f"at step {self._count} {' and '.join(self.sources)} differ in length: one has started again and the "
                "other has not; give them the same number of batches, with rows of the same tokens"
            )
        return {name: x.detach().to(self.device, torch.float32) for name, x in batch.items()}

    def _now(self) -> dict[str, dict[str, Any]]:
        return {name: source.state_dict() for name, source in self.sources.items()}
