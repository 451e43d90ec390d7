"""Numbers that were published with a dictionary, by others and on their own texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PUBLISHED = "published"
"""The entry of a dictionary's metadata that holds them."""


@dataclass(frozen=True)
class Published:
    """Published numbers; None if there is none.

    Attributes:
        l0: mean number of features that fire on a token.
        variance_explained: share of the activations' variance that is explained, up to 1.
        source: where the numbers stand.
    """

    l0: float | None = None
    variance_explained: float | None = None
    source: str = "its metadata"

    @staticmethod
    def of(metadata: Mapping[str, Any]) -> Published | None:
        """The numbers in a dictionary's metadata; None if it has none. What is not a finite number is left out."""
        record = metadata.get(PUBLISHED)
        if not isinstance(record, Mapping):
            return None
        l0, explained, source = (record.get(key) for key in ("l0", "variance_explained", "source"))
        published = Published(
            finite(l0), finite(explained), source if isinstance(source, str) else Published.source
        )  # fmt: skip
        return published if published.numbers else None

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers by name, without those that are unknown."""
        both = {"l0": self.l0, "variance_explained": self.variance_explained}
        return {name: value for name, value in both.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """The entry `published` of a dictionary's metadata, and of `eval.json`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def published_entry(l0: Any, source: str) -> dict[str, Any]:
    """Metadata with a published L0; empty if it is not a finite number.

    Args:
        l0: what a file or the name of a folder states.
        source: where it stands.
    """
    number = finite(l0)
    return {} if number is None else {PUBLISHED: Published(l0=number, source=source).to_json()}


def finite(value: object) -> float | None:
    """A number that a file states; None if it is not a finite one."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer that no float is as large as
        return None
