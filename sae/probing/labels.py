"""Labels as files and programs have them in; names of classes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def is_missing(label: Any) -> bool:
    """Whether it says nothing: null, empty text, or a number that is none (NaN), which is how tables mark it."""
    return label is None or (isinstance(label, str) and not label) or (isinstance(label, float) and math.isnan(label))


def other_kind(labels: Sequence[Any]) -> int | None:
    """Place of the first label that is text where those before are numbers or truth values, or the other way round."""
    kinds = [isinstance(label, int | float) for label in labels]
    return next((place for place, kind in enumerate(kinds) if kind != kinds[0]), None)


def class_names(labels: Sequence[Any]) -> list[str]:
    """A name for each label of a column, none of them missing: equal labels have equal names.

    Numbers are equal as numbers are: 1 and 1.0 are '1', and so is true in a column that has numbers too. A column of
    truth values alone has 'True' and 'False'. All else is its text, as far as UTF-8 can have it.
    """
    if all(isinstance(label, bool) for label in labels):
        return [str(label) for label in labels]
    return [_number(label) if isinstance(label, int | float) else _text(label) for label in labels]


def _text(label: Any) -> str:
    return str(label).encode("utf-8", "replace").decode()


def _number(label: int | float) -> str:
    return str(int(label)) if isinstance(label, int) or label.is_integer() else repr(float(label))
