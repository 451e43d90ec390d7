"""Sources of training batches: anything that yields `[batch, d_in]` and knows its place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.origin import Origin
from sae.errors import ConfigError, TrainingError
from sae.numerics.statistics import Statistics


@runtime_checkable
class BatchSource(Protocol):
    """Input of the training loop. `ActivationLoader` is one; `IterableSource` makes one from any iterable."""

    d_in: int
    batch_size: int

    @property
    def statistics(self) -> Statistics:
        """Mean and mean squared norm, from which the loop takes its scale."""
        ...

    @property
    def tokens_per_epoch(self) -> int | None:
        """Tokens in one pass; None if there is no end."""
        ...

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Batches from the current place, of any type that float32 can be made of, and on any device.

        To set a threshold, the loop reads a few before their step is due. Training on a GPU, it reads batches that are
        on the CPU one step ahead, in a thread; those on the GPU, and those of a `StoppableSource`, only in its own.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The current place: after the batch that was yielded last."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place; takes effect on the next `iter`."""
        ...

    def restart(self) -> None:
        """Go to the beginning, for a training that is not resumed; takes effect on the next `iter`."""
        ...


@runtime_checkable
class KnownSource(Protocol):
    """A source that says where its activations come from, as `ActivationLoader` does. Optional."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata of dictionaries trained on it, under the names of `sae.dictionary_metadata`."""
        ...


@runtime_checkable
class StoppableSource(Protocol):
    """A source that may compute for long before it has a batch, as one that runs a language model. Optional."""

    def stop_when(self, stopped: Callable[[], bool]) -> None:
        """Ask `stopped` from time to time; when it is true, raise TrainingInterrupted instead of the next batch."""
        ...


@runtime_checkable
class OrderedSource(Protocol):
    """A source that identifies its text and the order of its tokens, as `ActivationLoader` does. Optional."""

    @property
    def token_order(self) -> tuple[object, ...]:
        """Everything that decides the order; sources with equal orders yield rows of the same tokens."""
        ...

    @property
    def token_text(self) -> tuple[str | None, str]:
        """A hash of the text, and its name in error messages."""
        ...


def metadata_of(source: BatchSource, target: BatchSource | None) -> dict[str, Any]:
    """Metadata about a dictionary's activations; for a transcoder, only if both of its sources are known.

    Raises:
        ConfigError: the model computes the target before the input.
    """
    if not isinstance(source, KnownSource):
        return {}
    if target is None:
        return dict(source.metadata)
    if not isinstance(target, KnownSource):
        return {}
    return {**source.metadata, **Origin.of(source.metadata).giving(Origin.of(target.metadata)).to_json()}


class IterableSource:
    """A source from an iterable of equal batches `[batch, d_in]`, such as a toy model's samples.

    Statistics come from the first batches. To resume, the iterable is started again and the batches already used are
    skipped, so it must repeat itself: a list, or an object whose `__iter__` starts from the beginning.

    The first batch sets `batch_size`. Shorter ones, such as the last of a `DataLoader`, are left out, so that steps
    times `batch_size` is the number of tokens. `epoch` counts how often the iterable was restarted.

    Args:
        batches: iterated once per epoch.
        estimate_from: number of batches used for the statistics.

    Raises:
        ConfigError: `batches` can be iterated only once, or is a source already.
        TrainingError: there is no batch, or one that is not `[batch, d_in]`.
    """

    tokens_per_epoch: int | None = None

    def __init__(self, batches: Iterable[Float[Tensor, "_ d_in"]], estimate_from: int = 8) -> None:
        if isinstance(batches, Iterator):
            raise ConfigError(
                f"batches is a {type(batches).__name__}, which can be read only once; training reads it again in every "
                "epoch and to resume: pass a list, or an object whose __iter__ starts again"
            )
        if isinstance(batches, BatchSource):
            raise ConfigError(
                f"batches is a {type(batches).__name__}, a source already, which knows where its activations come "
                "from: pass it to sae.train directly"
            )
        first = list(itertools.islice(batches, estimate_from))
        for batch in first:
            _check(batch, like=first[0])
        if not first or not len(first[0]):
            raise TrainingError("the batches are empty: expected at least one of shape [batch, d_in]")
        self._batches = batches
        self.batch_size, self.d_in = first[0].shape
        self.statistics = Statistics.of(torch.cat(first))
        self._used = 0
        self.epoch = 0

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        skip = self._used
        for self.epoch in itertools.count():
            empty = True
            for batch in self._batches:
                if len(batch) < self.batch_size:
                    continue
                if len(batch) > self.batch_size:
                    raise TrainingError(
                        f"a batch has {len(batch)} rows, the first had {self.batch_size}: make all batches equally long"
                    )
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

    def restart(self) -> None:
        self._used = 0


def _check(batch: Any, like: Any) -> None:
    if not isinstance(batch, Tensor):
        raise TrainingError(
            f"a batch is a {type(batch).__name__}: expected a tensor [batch, d_in]; give a DataLoader the tensor "
            "itself, not a TensorDataset"
        )
    if batch.ndim != 2 or batch.shape[1] != like.shape[1]:
        raise TrainingError(
            f"a batch has shape {list(batch.shape)}: expected [batch, d_in], with d_in the same in all; "
            "flatten contexts with x.flatten(0, -2)"
        )
