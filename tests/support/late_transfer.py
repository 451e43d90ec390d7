"""Copies to a device without one: made as late as a stream of its own could make them."""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from sae.numerics.transfer import Event, Transfer

_CPU = torch.device("cpu")


class LateTransfer(Transfer):
    """Copies only when somebody waits for them, after those begun before: who does not wait finds other numbers.

    Host memory is given back by `synchronize` alone, because a stream that waits does not hold up the host.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        super().__init__(device)
        self.begun: deque[tuple[int, Tensor, Tensor]] = deque()
        self.lent: dict[int, tuple[int, Tensor]] = {}
        self.count = 0
        self.lock = threading.Lock()

    def copy(self, source: Tensor, target: Tensor) -> Event:
        with self.lock:
            self.count += 1
            assert source.data_ptr() not in self.lent, "the memory is still copied from"
            self.lent[source.data_ptr()] = self.count, source
            self.begun.append((self.count, source, target))
            return _Late(self, self.count)


class _Late:
    def __init__(self, transfer: LateTransfer, number: int) -> None:
        self.transfer, self.number = transfer, number

    def wait(self) -> None:
        with self.transfer.lock:
            while self.transfer.begun and self.transfer.begun[0][0] <= self.number:
                _, source, target = self.transfer.begun.popleft()
                target.copy_(source)

    def synchronize(self) -> None:
        self.wait()
        with self.transfer.lock:
            self.transfer.lent = {at: lent for at, lent in self.transfer.lent.items() if lent[0] > self.number}
