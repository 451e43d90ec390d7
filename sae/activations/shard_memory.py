"""One shard in memory: activations in the form in which they are stored, and their sums, filled batch by batch.

Nothing waits for the device. It converts, sums and checks the numbers, and copies them in a stream of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Sums = tuple[Tensor, float, int]
"""Sum `[d_in]` and sum of squares of activations, float64, and their number."""


@dataclass
class _HookSums:
    """What the device has computed of a hook point so far."""

    total: Tensor
    squares: Tensor
    count: int
    extremes: list[Tensor]


class ShardMemory:
    """Memory for the shards of a cache, one after the other.

    Args:
        rows: most rows of a shard.
        widths: d_in by hook point.
        dtype: number type of the stored activations.
        device: device of the activations that it is given.
    """

    def __init__(self, rows: int, widths: Mapping[str, int], dtype: str, device: torch.device) -> None:
        self._widths, self._device, self._rows = widths, device, 0
        self._on_gpu = device.type == "cuda"
        self._copying = torch.cuda.Stream(device) if self._on_gpu else None
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._stored = {hook: self._empty(rows, d_in, dtype) for hook, d_in in widths.items()}
        self._sums: dict[str, _HookSums] = {}
        self._results: dict[str, Tensor] = {}

    def _empty(self, rows: int, d_in: int, dtype: str) -> dict[str, Tensor]:
        tensors = {"activations": torch.empty(rows, d_in, dtype=getattr(torch, dtype), pin_memory=self._on_gpu)}
        return {**tensors, "scale": torch.empty(rows, pin_memory=self._on_gpu)} if dtype == "int8" else tensors

    def begin(self, rows: int) -> None:
        """Begin a shard of this many rows. The files of the last one must have been written."""
        self._rows = rows
        self._sums = {
            hook: _HookSums(
                torch.zeros(d_in, dtype=torch.float64, device=self._device),
                torch.zeros((), dtype=torch.float64, device=self._device),
                0,
                [],
            )
            for hook, d_in in self._widths.items()
        }

    def add(
        self, hook: str, start: int, rows: Float[Tensor, "rows d_in"], counted: Int[Tensor, " counted"] | None
    ) -> None:
        """Store rows from `start` on.

        Args:
            hook: hook point.
            start: first row in the shard.
            rows: activations, on the device.
            counted: indices of the rows to sum; None for no sums.
        """
        stop, sums = start + len(rows), self._sums[hook]
        targets = {name: tensor[start:stop] for name, tensor in self._stored[hook].items()}
        if "scale" in targets:
            scale = (rows.abs().amax(-1).float() / 127).clamp_min(torch.finfo(torch.float32).tiny)
            self._copy((rows / scale[:, None]).round_(), targets["activations"])
            checked = self._copy(scale, targets["scale"])
        else:
            checked = self._copy(rows, targets["activations"])
        sums.extremes.append(torch.stack(torch.aminmax(checked)))
        if counted is not None:
            x = (rows if len(counted) == len(rows) else rows.index_select(0, counted)).double()
            sums.total += x.sum(0)
            sums.squares += x.square_().sum()
            sums.count += len(x)

    def _copy(self, source: Tensor, target: Tensor) -> Tensor:
        """Copy from the device, in the target's number type; returns the copy, on the device."""
        if self._copying is None:
            return target.copy_(source)
        source = source.to(target.dtype)
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)
        source.record_stream(self._copying)
        return source

    def end(self) -> None:
        """End the shard: have its results copied as well."""
        for hook, sums in self._sums.items():
            extremes = torch.stack(sums.extremes).double().flatten()
            results = torch.cat([sums.total, sums.squares[None], extremes])
            self._results[hook] = torch.empty(results.shape, dtype=results.dtype, pin_memory=self._on_gpu)
            self._copy(results, self._results[hook])
        if self._copied is not None:
            self._copied.record(self._copying)

    def wait(self) -> None:
        """Wait until everything has been copied."""
        if self._copied is not None:
            self._copied.synchronize()

    def tensors(self, hook: str) -> dict[str, Tensor]:
        """What a file of the shard holds, after `wait`."""
        return {name: tensor[: self._rows] for name, tensor in self._stored[hook].items()}

    def is_finite(self, hook: str) -> bool:
        """Whether all stored numbers are finite; for int8, all scales. After `wait`."""
        return bool(self._results[hook][self._widths[hook] + 1 :].isfinite().all())

    def sums(self, hook: str) -> Sums:
        """Sums over the rows that count, after `wait`."""
        d_in, results = self._widths[hook], self._results[hook]
        return results[:d_in], float(results[d_in]), self._sums[hook].count
