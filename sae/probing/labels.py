"""Turn labels from files and programs into class names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def is_missing(label: Any) -> bool:
    """Whether a label is missing: null, empty text or NaN, which tables use for missing values."""
    return label is None or (isinstance(label, str) and not label) or (isinstance(label, float) and math.isnan(label))


def other_kind(labels: Sequence[Any]) -> int | None:
    """Index of the first label whose kind differs from the first: text after numbers or booleans, or vice versa."""
    kinds = [isinstance(label, int | float) for label in labels]
    return next((place for place, kind in enumerate(kinds) if kind != kinds[0]), None)


def class_names(labels: Sequence[Any]) -> list[str]:
    """A class name for each label of a column; no label may be missing, and equal labels get equal names.

    Numbers are compared as numbers: 1 and 1.0 are both '1', and so is true in a column that also has numbers. A column
    of booleans alone has 'True' and 'False'. Other labels keep their text, as far as UTF-8 can encode it.
    """
    if all(isinstance(label, bool) for label in labels):
        return [str(label) for label in labels]
    return [_number(label) if isinstance(label, int | float) else _text(label) for label in labels]


def _text(label: Any) -> str:
    return str(label).encode("utf-8", "replace").decode()


def _number(label: int | float) -> str:
    return str(int(label)) if isinstance(label, int) or label.is_integer() else repr(float(label))
