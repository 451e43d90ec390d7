"""Reads a common pass: a batch of every source per step, and batches of coming steps ahead of time."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import TrainingError
from sae.numerics.transfer import Event, Transfer
from sae.training.joined import JoinedSource, single_sources
from sae.training.recipe import Recipe
from sae.training.source import BatchSource, IterableSource, StoppableSource


@dataclass(frozen=True)
class _Read:
    """A batch of every source, and the sources' places after it; None: the places that they have now."""

    batch: dict[str, Float[Tensor, "batch _"]]
    places: dict[str, dict[str, Any]] | None


@dataclass(frozen=True)
class _Sent:
    """A batch on its way to the device."""

    target: Tensor
    copied: Event


class Reader:
    """Reads batches of several sources, in which equal rows belong to the same tokens.

    On a GPU, batches that sources give on the CPU are read one step ahead, in a thread, and copied from pinned memory
    while the GPU computes. Sources that give batches on the GPU, or are `StoppableSource`s because they run a model,
    are read by the calling thread when the step is due.

    The parts of a `JoinedSource` are read like other sources, and joined on the device.

    Args:
        sources: sources by name.
        device: where batches go.
        callers_mode: the caller's PyTorch modes, which apply to the sources, because one may run a language model.
        ahead: read ahead what comes on the CPU; None: if the device is a GPU.
    """

    def __init__(
        self, sources: Mapping[str, BatchSource], device: torch.device,
        callers_mode: Callable[[], contextlib.AbstractContextManager[None]], ahead: bool | None = None,
    ) -> None:  # fmt: skip
        self.names, self.sources = tuple(sources), single_sources(sources)
        self.device, self.callers_mode = device, callers_mode
        self._joins = {
            name: [next(key for key, single in self.sources.items() if single is part) for part in source.parts]
            for name, source in sources.items() if isinstance(source, JoinedSource)
        }  # fmt: skip
        self._prefetches = device.type == "cuda" if ahead is None else ahead
        self._transfer = Transfer(device)
        self._count, self._last = 0, 0
        self._ahead: deque[_Read] = deque()
        self._places: dict[str, dict[str, Any]] | None = None  # at the newest step; None: the sources' own
        self._unreadable: Exception | None = None
        self._batches: Iterator[tuple[Tensor, ...]] = iter(())
        self._thread: ThreadPoolExecutor | None = None
        self._coming: Future[tuple[dict[str, _Sent], dict[str, dict[str, Any]]] | None] | None = None
        self._buffers: dict[str, deque[tuple[Tensor, Event]]] = {name: deque() for name in self.sources}

    @contextlib.contextmanager
    def reading(self, steps_done: int, steps: int) -> Iterator[None]:
        """Start reading at the sources' places; at the end, no thread uses the sources any more.

        Args:
            steps_done: number of steps before.
            steps: number of steps in all; nothing is read ahead for later ones.
        """
        self._count, self._last, self._batches = steps_done, steps, self._rows()
        try:
            yield
        finally:
            if self._thread is not None:
                wait([] if self._coming is None else [self._coming])
                self._thread.shutdown()
                self._thread, self._coming = None, None

    def stop_when(self, stopped: Callable[[], bool]) -> None:
        """Let sources that compute for long ask whether to stop."""
        for source in self.sources.values():
            if isinstance(source, StoppableSource):
                source.stop_when(stopped)

    def _rows(self) -> Iterator[tuple[Tensor, ...]]:
        """A generator, so that sources are first asked for an iterator under the caller's modes."""
        yield from zip(*self.sources.values(), strict=False)

    def next(self) -> dict[str, Float[Tensor, "batch _"]] | None:
        """The next batch by source, float32 on the device; None if there is no more.

        Raises:
            TrainingError: the batches do not fit together.
        """
        if not self._ahead and self._unreadable is not None:
            raise self._unreadable
        read = self._ahead.popleft() if self._ahead else self._read()
        self._places = None if read is None else read.places
        return None if read is None else read.batch

    def look_ahead(self, count: int) -> list[dict[str, Float[Tensor, "batch _"]]]:
        """The next `count` batches, or fewer at the end; `next` still returns them."""
        self._places = self._places or self._now()
        try:
            while self._unreadable is None and len(self._ahead) < count and (read := self._read()) is not None:
                copies = {name: x.clone() for name, x in read.batch.items()}  # an iterable may reuse its buffer
                self._ahead.append(_Read(copies, read.places or self._now()))
        except Exception as error:  # raised when its step is due, if ever
            self._unreadable = error
        return [read.batch for read in self._ahead]

    def places_of(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """Places of a recipe's sources, by role: their names differ from pass to pass."""
        places = self._places or self._now()
        for name, parts in self._joins.items():
            places = {**places, name: {"parts": [places[part] for part in parts]}}
        return {role: places[name] for role, name in recipe.sources.items()}

    def _read(self) -> _Read | None:
        """The batches of the next step that was not read yet; the step after it is begun to be read."""
        if self._coming is not None:
            coming, self._coming = self._coming, None
            sent = coming.result()
            if sent is None:
                return None
            self._prefetch()
            return _Read(self._joined({name: self._received(x) for name, x in sent[0].items()}), sent[1])
        parts = self._parts()
        if parts is None:
            return None
        places = self._now() if self._prefetches else None
        copy = self._prefetches  # the source may use its memory again for the next batch
        batch = {name: x.to(self.device, torch.float32, copy=copy) for name, x in parts.items()}
        self._prefetches = self._prefetches and self._can_be_read_in_a_thread(parts)
        if self._prefetches:
            self._prefetch()
        return _Read(self._joined(batch), places)

    def _joined(self, batch: dict[str, Tensor]) -> dict[str, Float[Tensor, "batch _"]]:
        """The batch of every source from those that were read."""
        joined = {name: torch.cat([batch[part] for part in parts], dim=1) for name, parts in self._joins.items()}
        return {name: joined[name] if name in joined else batch[name] for name in self.names}

    def _parts(self) -> dict[str, Tensor] | None:
        """A batch of every source, as the source gives it."""
        with self.callers_mode():
            parts = next(self._batches, None)
        if parts is None:
            return None
        batch = {name: x.detach() for name, x in zip(self.sources, parts, strict=True)}
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
        return batch

    def _can_be_read_in_a_thread(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether no source runs a model, uses the device, or needs another default type, which all threads share."""
        with self.callers_mode():
            same_type = torch.get_default_dtype() == torch.float32
        runs_model = any(isinstance(source, StoppableSource) for source in self.sources.values())
        return same_type and not runs_model and all(x.device.type == "cpu" for x in parts.values())

    def _prefetch(self) -> None:
        if self._count < self._last:
            self._thread = self._thread or ThreadPoolExecutor(1)
            self._coming = self._thread.submit(self._send)

    def _send(self) -> tuple[dict[str, _Sent], dict[str, dict[str, Any]]] | None:
        """Read a batch of every source, and begin to copy it to the device."""
        parts = self._parts()
        if parts is None:
            return None
        return {name: self._send_one(name, x) for name, x in parts.items()}, self._now()

    def _send_one(self, name: str, x: Tensor) -> _Sent:
        """Begin to copy a batch from one of two buffers, so that the source may use its own memory again."""
        buffers = self._buffers[name]
        buffer, copied = buffers.popleft() if len(buffers) == 2 else (None, None)
        if copied is not None:
            copied.synchronize()
        if buffer is None or buffer.shape != x.shape or buffer.dtype != x.dtype:
            buffer = self._transfer.host_memory(*x.shape, dtype=x.dtype)
        buffer.copy_(x)
        target = self._transfer.device_memory(*x.shape, dtype=x.dtype)
        copied = self._transfer.copy(buffer, target)
        buffers.append((buffer, copied))
        return _Sent(target, copied)

    def _received(self, sent: _Sent) -> Float[Tensor, "batch _"]:
        self._transfer.receive(sent.copied, sent.target)
        return sent.target.float()

    def _now(self) -> dict[str, dict[str, Any]]:
        return {name: source.state_dict() for name, source in self.sources.items()}
