"""The maximum length of a record, and messages for longer ones and for repeated keys and columns."""

from __future__ import annotations

import sys
from pathlib import Path

MOST_IN_RECORD = 32 << 20
"""Maximum bytes of a record in .jsonl, and characters of one in .json, .csv and .tsv."""


def most_in_record(reading: int) -> int:
    """Maximum bytes or characters of a record; versions 0 to 3 of the reading had no limit."""
    return MOST_IN_RECORD if reading >= 4 else sys.maxsize - 2


def too_long(path: Path, record: str, unit: str) -> str:
    """The message for a record that is too long, with the way out."""
    return (
        f"data source {str(path)!r}: {record} has more than {MOST_IN_RECORD:,} {unit}; cut its text into several "
        "records, or give it as .txt, which is read in pieces"
    )


def there_twice(where: str, kind: str, name: str) -> str:
    """The message for a repeated key or column, with the way out."""
    return f"data source {where}: {kind} {name!r} is there more than once; rename or remove all but one"
