"""Means of the losses that the loop logs, and the time its steps take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.training.objectives import Losses


class Meter:
    """Means over the steps since the last reading, summed on the device and read once.

    A term missing in some steps, such as AuxK while nothing is dead, counts as 0 there.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self._sums: dict[str, Tensor] = {}
        self._seen: dict[str, None] = {}
        self._steps = self._timed = 0
        self._since = time.perf_counter()

    def add(self, losses: Losses, variance: Float[Tensor, ""]) -> None:
        """Add a step; `variance` is the variance of its targets."""
        self.count(self.sum(losses, variance))

    @torch.no_grad()
    def sum(self, losses: Losses, variance: Float[Tensor, ""]) -> tuple[str, ...]:
        """The part of `add` that is the device's; sums stay where they are. Returns the names of what was added."""
        fvu = losses.terms["mse"] / variance.clamp_min(torch.finfo(variance.dtype).tiny)
        objective = losses.total.detach()
        loss = objective if losses.revived is None else objective - losses.revived
        metrics = {"loss": loss, "objective": objective, **losses.terms, "fvu": fvu, "l0": losses.l0}
        for name, value in metrics.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(value)
            self._sums[name] += value
        return tuple(metrics)

    def count(self, names: tuple[str, ...]) -> None:
        """The rest of `add`."""
        self._seen.update(dict.fromkeys(names))
        self._steps, self._timed = self._steps + 1, self._timed + 1

    def read(self) -> dict[str, float]:
        means = {name: float(self._sums[name]) / self._steps for name in self._seen}
        for value in self._sums.values():
            value.zero_()
        now = time.perf_counter()
        means["tokens_per_second"] = self._timed * self.batch_size / max(now - self._since, 1e-9)
        self._seen, self._steps, self._timed, self._since = {}, 0, 0, now
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last reading, so that a resumed training logs the same as an uninterrupted one."""
        return {"sums": {name: self._sums[name].clone() for name in self._seen}, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue with the sums of an earlier process; the time counts from now."""
        self._sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}
        self._seen = dict.fromkeys(self._sums)
        self._steps, self._timed, self._since = state["steps"], 0, time.perf_counter()


class Stopwatch:
    """Total seconds spent inside `with`. On a GPU, events measure them, so that nothing waits until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds, self._start = 0.0, 0.0
        self._events: list[Any] = []

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self._mark()
        else:
            self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self._mark()
            if len(self._events) > 4096:
                self.seconds()
        else:
            self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """Seconds so far. Waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            self._seconds += sum(start.elapsed_time(end) for start, end in pairs) / 1e3
            self._events = []
        return self._seconds

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._events.append(event)


def falling(metrics: Mapping[str, float | int]) -> str:
    """FVU and L0 of logged metrics in a few characters; both fall while training goes well."""
    fvu, l0 = metrics.get("fvu"), metrics.get("l0")
    return "" if fvu is None or l0 is None else f"FVU {fvu:.3f}, L0 {l0:.3g}"
