"""Which cases of a test are quick enough for every run; the others are marked slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def quick_for(quick: Iterable[str], values: Iterable[str]) -> list[Any]:
    """The values as parameters, all but the quick ones marked slow."""
    chosen = set(quick)
    found = [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]
    assert chosen <= {value for value in found if isinstance(value, str)}
    return found
