"""Where training batches come from: anything that yields `[batch, d_in]` and knows its place."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.cache import Statistics


@runtime_checkable
class BatchSource(Protocol):
    """What the loop asks of its input. `ActivationLoader` is one; `IterableSource` makes one of any iterable."""

    d_in: int
    batch_size: int

    @property
    def statistics(self) -> Statistics:
        """Mean and mean squared norm, by which the loop normalises."""
        ...

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens in one pass; None where there is no end."""
        ...

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Batches from the present place on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The present place."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place; takes effect on the next `iter`."""
        ...


class IterableSource:
    """A source from an iterable of equal batches `[batch, d_in]`, such as a toy model's samples.

    Statistics come from the first batches. To resume, the iterable is started anew and the batches already used are
    passed over, so it must repeat itself: a list, or an object whose `__iter__` starts from the beginning.

    Args:
        batches: iterated once per epoch.
        estimate_from: number of batches the statistics are taken from.
    """

    tokens_per_epoch: int | None = None

    def __init__(self, batches: Iterable[Float[Tensor, "batch d_in"]], estimate_from: int = 8) -> None:
        self._batches = batches
        sample = torch.cat(list(itertools.islice(batches, estimate_from))).double()
        self.d_in = sample.shape[1]
        self.batch_size = len(next(iter(batches)))
        self.statistics = Statistics(len(sample), sample.mean(0).float(), float(sample.square().sum(1).mean()))
        self._used = 0

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        skip = self._used
        while True:
            empty = True
            for batch in self._batches:
                empty = False
                if skip:
                    skip -= 1
                    continue
                self._used += 1
                yield batch
            if empty:
                return

    def state_dict(self) -> dict[str, int]:
        return {"used": self._used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._used = state["used"]
