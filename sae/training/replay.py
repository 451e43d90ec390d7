"""Steps recorded once as CUDA graphs and replayed, so that a step costs the host a few launches instead of hundreds."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.interface import Room

PLAIN_STEPS = 2
"""Steps of a variant that run plainly before one is recorded: they compile kernels and create what lasts."""
SLACK = 1.25
"""Room for pairs, relative to the number in the step before."""
Compute = Callable[[Tensor, Tensor | None, Room], tuple[str, ...]]
"""The device's part of a step, from its input, its target and room for pairs, to the names of what it logs."""


@runtime_checkable
class Graph(Protocol):
    """A recorded sequence of the device's operations, such as `torch.cuda.CUDAGraph`."""

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


class Recorder:
    """Records what the device is asked to do, for all dictionaries of a pass, which share memory between its steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        self._pool: Any = None

    def begin(self) -> Graph:
        """Start recording; nothing is computed until the recording is replayed."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # a thread that reads may allocate
        return graph

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside `with`, the device's work is on the stream where recording is possible, in order with all other."""
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            outside = torch.cuda.current_stream()
            self._stream.wait_stream(outside)
            with torch.cuda.stream(self._stream):
                yield
            outside.wait_stream(self._stream)

    def settle(self) -> None:
        """Before recording: finish all work, and return memory that recorded steps can use."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


@dataclass
class _Recording:
    """A recorded step: parts, and between the first two, the number of pairs to check against the room for them."""

    parts: list[Graph] = field(default_factory=list)
    pairs: Int[Tensor, ""] | None = None
    names: tuple[str, ...] = ()


class Batches:
    """Keeps the newest batch of every source in one place, from which recorded steps read."""

    def __init__(self) -> None:
        self._batch: dict[str, Tensor] = {}

    def keep(self, batch: Mapping[str, Float[Tensor, "batch _"]]) -> dict[str, Float[Tensor, "batch _"]]:
        """Copy a batch to its place; a batch of another shape or dtype gets a new one."""
        for name, x in batch.items():
            kept = self._batch.get(name)
            if kept is None or (kept.shape, kept.dtype) != (x.shape, x.dtype):
                self._batch[name] = x.clone(memory_format=torch.contiguous_format)
            else:
                kept.copy_(x)
        return dict(self._batch)


class Replay:
    """Takes the steps of one dictionary: plainly at first, then by replaying a recorded one.

    Args:
        recorder: the pass's recorder.
        compute: the device's part of a step.
        variant: what decides which operations the next step has; each variant is recorded by itself.
        discard: drops what a step that was broken off has left behind.
    """

    def __init__(
        self, recorder: Recorder, compute: Compute, variant: Callable[[], tuple[int | bool, ...]],
        discard: Callable[[], None],
    ) -> None:  # fmt: skip
        self.recorder, self.compute, self.variant, self.discard = recorder, compute, variant, discard
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._plain: dict[tuple[Any, ...], int] = {}
        self._capacity = 0
        self._failed = False

    def step(self, raw: Tensor, raw_target: Tensor | None) -> tuple[str, ...]:
        """Take a step; the tensors must be at the same place each time (`Batches`), or they are recorded anew.

        Returns:
            The names of what was logged.
        """
        places = tuple((x.data_ptr(), x.dtype) for x in (raw, raw_target) if x is not None)
        key = (*self.variant(), self._capacity, *places)
        recording = self._recordings.get(key)
        if recording is None and not self._failed and self._plain.get(key, 0) >= PLAIN_STEPS:
            recording = self._record(raw, raw_target)
            if recording is not None:
                self._recordings[key] = recording
        if recording is not None and self._replayed(recording):
            return recording.names
        self._plain[key] = self._plain.get(key, 0) + 1
        return self._step_plainly(raw, raw_target)

    def _step_plainly(self, raw: Tensor, raw_target: Tensor | None) -> tuple[str, ...]:
        room = Room()
        with self.recorder.aside():
            names = self.compute(raw, raw_target, room)
        if room.pairs is not None:
            self._make_room(room.pairs)
        return names

    def _replayed(self, recording: _Recording) -> bool:
        """Replay a step, unless it needs more room than it has: then nothing has changed."""
        first, *others = recording.parts
        first.replay()
        if recording.pairs is not None:
            pairs, capacity = int(recording.pairs), self._capacity
            self._make_room(pairs)
            if pairs > capacity:
                return False
        for part in others:
            part.replay()
        return True

    def _make_room(self, pairs: int) -> None:
        """Choose the capacity: one of a few, changed if it is too small, or more than twice what is needed."""
        needed = rounded_up(int(SLACK * pairs))
        if self._capacity < pairs or self._capacity > 2 * needed:
            self._capacity = needed

    def _record(self, raw: Tensor, raw_target: Tensor | None) -> _Recording | None:
        """Record a step without taking it; None if that is impossible, with a warning: also if memory is short, since
        plain steps need less.

        What enters the room for pairs is a part by itself, after which nothing has changed yet: whether they fit is
        found out before the second part is replayed.
        """
        recording = _Recording()

        def enter(pairs: Tensor) -> None:
            recording.pairs = pairs
            recording.parts[-1].capture_end()
            recording.parts.append(self.recorder.begin())

        self.recorder.settle()
        try:
            with self.recorder.aside():
                recording.parts.append(self.recorder.begin())
                try:
                    recording.names = self.compute(raw, raw_target, Room(self._capacity or None, enter))
                finally:
                    recording.parts[-1].capture_end()
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            self._failed = True
            self.discard()
            warnings.warn(
                f"steps could not be recorded as CUDA graphs, so training continues without, more slowly: {error}",
                stacklevel=2,
            )
            return None
        return recording


def rounded_up(number: int) -> int:
    """The next of the numbers 4, 5, 6 and 7 times a power of two, and 4,096 at least."""
    number = max(number, 4096)
    unit = 1 << (number - 1).bit_length() - 3
    return -(-number // unit) * unit
