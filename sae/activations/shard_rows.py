"""The activations of a shard as rows of bytes, to be read in any choice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sae.activations.manifest import RESTORE
from sae.files.damage import damaged, unreadable
from sae.files.digest import TIMES_READ, Identity, identity_of, open_regular
from sae.files.reading import tensor_start
from sae.files.scattered import RowFile, populate


class ShardRows:
    """Rows of a shard that was compared with its hash.

    Args:
        path: the file.
        check: compares it with its hash, if it was not since it was written, and returns its identity.
        activations: its activations, mapped into memory.
        scale: the scale of each row, for int8.

    Raises:
        DamagedError: the file is damaged.
    """

    def __init__(
        self, path: Path, check: Callable[[], Identity], activations: Shaped[Tensor, "rows d_in"],
        scale: Float[Tensor, " rows"] | None,
    ) -> None:  # fmt: skip
        self.path, self.activations, self.scale, self._check = path, activations, scale, check
        self._identity = check()
        with os.fdopen(open_regular(path, RESTORE), "rb") as file:
            self._start = tensor_start(file, "activations", path, RESTORE)

    def read(self, rows: Int[np.ndarray, " rows"], out: Shaped[np.ndarray, " rows"]) -> None:
        """Read rows, as stored.

        Args:
            rows: their numbers, ascending.
            out: contiguous items of a row's bytes.

        Raises:
            DamagedError: the shard has changed, or is written to meanwhile.
            UnreadableError: the machine cannot read it.
        """
        until_unchanged([self], lambda: self._read(rows, out))

    def _read(self, rows: Int[np.ndarray, " rows"], out: Shaped[np.ndarray, " rows"]) -> None:
        with self._opened() as file:
            try:
                file.read(rows, out)
            except OSError as error:
                raise unreadable(self.path, error, RESTORE) from error
            except EOFError as error:
                raise damaged(self.path, f"damaged ({error})", RESTORE) from error

    def map(self, rows: Int[np.ndarray, " rows"]) -> bool:
        """Have the system read rows into the memory that `activations` is mapped to.

        Args:
            rows: their numbers, ascending.

        Returns:
            False if it cannot; then reading them tells why.
        """
        with self._opened() as file, contextlib.suppress(OSError):
            file.announce(rows)
        return populate(self.activations.data_ptr(), rows, self._row_bytes)

    def is_cached(self, rows: Int[np.ndarray, " rows"]) -> bool:
        """Whether rows can be copied from `activations` without waiting for the disk.

        Raises:
            DamagedError: the shard is missing.
        """
        with self._opened() as file:
            return file.is_cached(rows)

    @property
    def _row_bytes(self) -> int:
        return self.activations.shape[1] * self.activations.element_size()

    def is_unchanged(self) -> bool:
        """Whether the file is still the one that was compared with its hash; if not, it is compared again.

        Raises:
            DamagedError: it differs from its hash.
        """
        try:
            state = os.stat(self.path)  # noqa: PTH116  (asked for every few batches)
        except OSError as error:
            raise unreadable(self.path, error, RESTORE) from error
        if identity_of(state) == self._identity:
            return True
        self._identity = self._check()
        return False

    @contextlib.contextmanager
    def _opened(self) -> Iterator[RowFile]:
        with os.fdopen(open_regular(self.path, RESTORE), "rb", buffering=0) as file:
            yield RowFile(file.fileno(), self._start, self._row_bytes)


def until_unchanged(shards: Sequence[ShardRows], copy: Callable[[], None]) -> None:
    """Copy rows of shards, and do so again if a shard was written to before the end.

    Raises:
        DamagedError: a shard differs from its hash, or is written to again and again.
    """
    changed = list(shards)
    for _ in range(TIMES_READ):
        copy()
        changed = [shard for shard in shards if not shard.is_unchanged()]
        if not changed:
            return
    raise damaged(changed[0].path, "changes while it is read; wait for the process that writes it", RESTORE)


def as_rows(stored: Shaped[Tensor, "rows d_in"]) -> Shaped[np.ndarray, " rows"]:
    """The rows of a contiguous tensor in memory, as items of bytes."""
    rows = stored.view(torch.uint8).numpy()
    return rows.view(f"V{rows.shape[1]}")[:, 0]
