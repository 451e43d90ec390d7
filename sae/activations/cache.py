"""The activation cache on disk, opened for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.manifest import HookEntry
from sae.activations.shard_rows import ShardRows
from sae.activations.tokens import ContextBatch, TokenStore
from sae.config.splits import TRAIN
from sae.errors import CacheError
from sae.numerics.modes import in_own_modes
from sae.numerics.statistics import Statistics

NUMBER_TYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8,
}  # fmt: skip


class ActivationCache(TokenStore):
    """A harvested cache: the tokens of a text, and a model's activations on them at one or more hook points.

    Shards are mapped into memory, not read. Every file is compared with its hash before its first use in a process. Of
    a cache for live training, this is the part whose activations are stored; a `TokenStore` has the whole text.

    Args:
        path: the cache's folder, or the run folder that holds it.

    Raises:
        CacheError: there is no complete cache, or a file's size differs from the manifest.
        DamagedError: (a CacheError) the manifest is damaged; when reading, a shard is.
    """

    @property
    def hooks(self) -> tuple[str, ...]:
        """Hook points in the cache."""
        return tuple(self.manifest.hooks)

    @property
    def is_live(self) -> bool:
        """Whether most training activations are not stored, but computed during training."""
        return self.manifest.stored is not None

    def rows(self, split: str = TRAIN) -> int:
        """Tokens in a split whose activations are stored, including masked ones."""
        return self.manifest.stored_rows(split)

    def d_in(self, hook: str) -> int:
        """Width of the activations at `hook`."""
        return self._hook(hook).d_in

    @property
    def stored_dtype(self) -> torch.dtype:
        """Type of the stored numbers."""
        return NUMBER_TYPES[self.manifest.dtype]

    def statistics(self, hook: str) -> Statistics:
        """Mean and mean squared norm of the stored training activations at `hook`.

        Raises:
            CacheError: the hook point is not in the cache, or every training token is masked.
        """
        entry = self._hook(hook)
        if entry.tokens == 0:
            raise CacheError(f"cache {str(self.path)!r}: every training token is masked, so there are no statistics")
        mean = torch.tensor(entry.sum, dtype=torch.float64, device="cpu") / entry.tokens
        return Statistics(entry.tokens, mean, entry.sum_of_squares / entry.tokens)

    def activation_shard(self, hook: str, split: str, number: int) -> tuple[Tensor, Float[Tensor, " rows"] | None]:
        """Stored activations `[rows, d_in]` of a shard, mapped into memory, and the scale of each row for int8."""
        name, rows, d_in = self._name(hook, split, number), self._shard_rows(split, number), self.d_in(hook)
        scale = self._tensor(name, "scale", torch.float32, (rows,)) if self.manifest.dtype == "int8" else None
        return self._tensor(name, "activations", self.stored_dtype, (rows, d_in)), scale

    def shard_rows(self, hook: str, split: str, number: int) -> ShardRows:
        """The stored rows of a shard, to be copied to other places in memory."""
        name = self._name(hook, split, number)
        return ShardRows(self.path / name, partial(self._check, name), *self.activation_shard(hook, split, number))

    @in_own_modes
    def contexts(
        self, split: str = TRAIN, hook: str | None = None, *, batch_contexts: int = 64, max_tokens: int | None = None
    ) -> Iterator[ContextBatch]:
        """A split in text order, a few contexts at a time, without the contexts that would exceed `max_tokens`.

        If the last context is shorter than the others, it forms a batch of its own.
        """
        if hook:
            self._hook(hook)
        yield from self._contexts(split, hook, batch_contexts, max_tokens)

    def _activations(self, hook: str | None, split: str, number: int) -> Callable[[slice], Tensor | None]:
        if hook is None:
            return super()._activations(hook, split, number)
        activations, scale = self.activation_shard(hook, split, number)
        return lambda rows: dequantise(activations[rows], None if scale is None else scale[rows])

    def _numbers(self, split: str) -> Sequence[int]:
        return self.manifest.stored_shards(split)

    def _hook(self, hook: str) -> HookEntry:
        if hook not in self.manifest.hooks:
            raise CacheError(f"cache {str(self.path)!r}: hook {hook!r} is not in it; it holds {', '.join(self.hooks)}")
        return self.manifest.hooks[hook]

    def __repr__(self) -> str:
        rows = ", ".join(f"{count:,} {split}{self._origin(split)}" for split, count in self.manifest.rows.items())
        live = f"; live, {self.rows():,} train tokens stored" if self.is_live else ""
        facts = f"{rows} tokens, {', '.join(self.hooks)}, {self.manifest.dtype}{live}"
        return f"ActivationCache({str(self.path)!r}: {facts})"


def dequantise(activations: Tensor, scale: Tensor | None) -> Float[Tensor, "rows d_in"]:
    """Convert stored activations to float32."""
    return activations.float() if scale is None else activations.float() * scale[:, None]
