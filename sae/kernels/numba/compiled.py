"""Compilation by Numba: without Python's lock, kept on disk for other processes, with sums that may be vectorised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz"},  # NaNs and infinities keep their meaning
}


def compiled(function: Callable[..., Any]) -> Any:
    """Decorator: compile on the first call with types that no process on this machine has used."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(**_OPTIONS)(function)
