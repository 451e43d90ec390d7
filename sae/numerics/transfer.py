"""Copies to a device ahead of their use: from pinned memory, on a stream of their own."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Event(Protocol):
    """A moment on a stream, as `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Wait until it has passed."""
        ...

    def wait(self) -> None:
        """Let what the calling thread's stream is given from now on wait until it has passed."""
        ...


class _Passed:
    """The event of a device that finishes each operation before the next."""

    def synchronize(self) -> None: ...

    def wait(self) -> None: ...


class Transfer:
    """Copies from pinned host memory to a device, while the device computes on other streams.

    On devices other than CUDA, memory is not pinned, and copies are finished when `copy` returns.

    Args:
        device: where the copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def host_memory(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host to copy from; its content is undefined."""
        with torch.inference_mode(False):  # other threads write to it, outside the caller's mode
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self._stream is not None)

    def device_memory(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Memory of the device to copy to; to be used only after `receive`."""
        with torch.inference_mode(False), torch.cuda.stream(self._stream):
            return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, source: Tensor, target: Tensor) -> Event:
        """Begin a copy, after those begun before; neither side may be used before the event that is returned."""
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=self._stream is not None)
            return _Passed() if self._stream is None else self._stream.record_event()

    def receive(self, event: Event, *tensors: Tensor) -> None:
        """Let the calling thread's stream use device memory after a copy into it."""
        event.wait()
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(self.device))

    def follow(self) -> None:
        """Let copies begun from now on wait for what the calling thread's stream was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
