"""Dictionaries by name, from a hub and to it: methods of every dictionary, whose work is done on higher floors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from sae.errors import FormatError

Kind = TypeVar("Kind")


class Exchanged:
    """`sae.load` and `sae.push` as methods, as users of the hub's other libraries expect them.

    They stand here, and not in `Dictionary`, because they know nothing of it; and they call the package's public
    functions, because a file of this floor imports no format and no run.
    """

    @classmethod
    def from_pretrained(
        cls: type[Kind], name: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Kind:  # fmt: skip
        """Load a dictionary, as `sae.load`: from a folder, or by its name on the hub.

        Args:
            name: what `sae.load` takes.
            device: device of its weights.
            dtype: their number type; None: as stored, at least float32 for other toolkits' files.

        Raises:
            FormatError: it cannot be loaded, or is of another class than this one.
        """
        dictionary = _package().load(name, device=device, dtype=dtype)
        if not isinstance(dictionary, cls):
            raise FormatError(
                f"dictionary {str(name)!r}: a {type(dictionary).__name__}, not a {cls.__name__}; "
                "sae.SparseAutoencoder.from_pretrained loads every kind"
            )
        return dictionary

    def push_to_hub(self, name: str, *, private: bool = False, licence: str | None = None) -> Any:
        """Upload this dictionary to the hub, as `sae.push`.

        Args:
            name: `organisation/repository`, with `:path` if wanted.
            private: a new repository is private, and a public one is refused.
            licence: name of the licence, such as `mit`; None: none is stated.

        Returns:
            A `sae.runs.publishing.Publication`.
        """
        return _package().push(self, name, private=private, licence=licence)


def _package() -> ModuleType:
    """The package itself, which imports its public names when they are used."""
    return sys.modules[__name__.partition(".")[0]]
