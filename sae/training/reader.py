"""What a common pass reads: a batch of every source, some of them before their step is due."""

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
from sae.training.source import BatchSource, IterableSource


@dataclass(frozen=True)
class _Read:
    """A batch of every source, and the places where they are after it."""

    batch: dict[str, Float[Tensor, "batch d_in"]]
    places: dict[str, dict[str, Any]]


class Reader:
    """Batches of several sources, row by row of the same tokens.

    Args:
        sources: by name.
        device: where batches go.
        callers_mode: the caller's PyTorch modes, which hold for the sources: one may run a language model.
    """

    def __init__(
        self, sources: Mapping[str, BatchSource], device: torch.device,
        callers_mode: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self.sources, self.device, self.callers_mode = sources, device, callers_mode
        self._count = 0
        self._ahead: deque[_Read] = deque()
        self._places: dict[str, dict[str, Any]] | None = None  # of the newest step; None: where the sources are
        self._unreadable: Exception | None = None
        self._batches: Iterator[tuple[Tensor, ...]] = iter(())

    def begin(self, steps_done: int) -> None:
        """Read from where the sources are."""
        self._count, self._batches = steps_done, zip(*self.sources.values(), strict=False)

    def next(self) -> dict[str, Float[Tensor, "batch d_in"]] | None:
        """The next batch by source, float32 on the device; None if there is no more.

        Raises:
            TrainingError: batches that do not fit each other.
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
        """The batches that come next, that many or as many as there are; `next` still gives them."""
        self._places = self._places or self._now()
        try:
            while self._unreadable is None and len(self._ahead) < count and (batch := self._read()) is not None:
                copied = {name: x.clone() for name, x in batch.items()}  # an iterable may fill one buffer again
                self._ahead.append(_Read(copied, self._now()))
        except Exception as error:  # of a step that is not due yet, or never will be
            self._unreadable = error
        return [read.batch for read in self._ahead]

    def places_of(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """Where the sources of a recipe are, by what they are to it: their names differ from pass to pass."""
        names = {"input": recipe.source, "target": recipe.target}
        places = self._places or self._now()
        return {role: places[name] for role, name in names.items() if name is not None}

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
                f"at step {self._count} {' and '.join(self.sources)} are not of one length: one has begun anew and the "
                "other has not; give them as many batches each, row by row of the same tokens"
            )
        return {name: x.detach().to(self.device, torch.float32) for name, x in batch.items()}

    def _now(self) -> dict[str, dict[str, Any]]:
        return {name: source.state_dict() for name, source in self.sources.items()}
