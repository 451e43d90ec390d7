"""How long a record may be, and what is said where one is longer, or holds what is read of it twice."""

from __future__ import annotations

import sys
from pathlib import Path

MOST_IN_RECORD = 32 << 20
"""Bytes of a record in .jsonl, characters of one in .json, .csv and .tsv."""


def most_in_record(reading: int) -> int:
    """How many bytes or characters a record may have; versions 0 to 3 of the reading had no bound."""
    return MOST_IN_RECORD if reading >= 4 else sys.maxsize - 2


def too_long(path: Path, record: str, unit: str) -> str:
    """That a record is too long, and the way out."""
    return (
        f"data source {str(path)!r}: {record} has more than {MOST_IN_RECORD:,} {unit}; cut its text into several "
        "records, or give it as .txt, which is read in pieces"
    )


def there_twice(where: str, kind: str, name: str) -> str:
    """That what is read is there more than once, and the way out."""
    return f"data source {where}: {kind} {name!r} is there more than once; rename or remove all but one"
