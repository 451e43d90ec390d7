"""Counts of a source's entries that are skipped or special, and the lines that report them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sae.files.printable import printable

_SEVERAL = {
    "link to a folder": "links to folders",
    "link to nothing": "links to nothing",
    "folder that cannot be opened": "folders that cannot be opened",
}


@dataclass
class Census:
    """Counts of a source, up to where it was read.

    Attributes:
        empty: rows without text.
        duplicates: documents equal to one that was read before.
        hidden: hidden files and folders.
        own: files that this toolkit wrote.
        irregular: entries that are neither files nor folders to enter, by kind: links to folders, broken links, pipes.
        other_kinds: files of kinds that are not read, by suffix.
        without_column: .json, .csv and .tsv files in a folder that lack the column.
        pretokenised, chats: documents that were token ids, and chats.
        roles: roles of the messages in tokenised chats.
        repeated_sections: sections equal to one on the other side of the held-out split, if sections are divided.
        unit: unit of the held-out split and of standard errors: `document` or `section`.
    """

    empty: int = 0
    duplicates: int = 0
    hidden: int = 0
    own: int = 0
    irregular: Counter[str] = field(default_factory=Counter)
    other_kinds: Counter[str] = field(default_factory=Counter)
    without_column: list[str] = field(default_factory=list)
    pretokenised: int = 0
    chats: int = 0
    roles: Counter[str] = field(default_factory=Counter)
    repeated_sections: int = 0
    unit: str = "document"

    def lines(self, source: str, *, chose_unit: bool) -> list[str]:
        """Notes for the user, a line each; none if the whole source was read unchanged.

        Args:
            source: its name.
            chose_unit: whether the user chose the unit of the held-out split.
        """
        names = ", ".join(self.without_column[:3]) + (", …" if len(self.without_column) > 3 else "")
        notes = {
            "it is one document: its sections are divided into training and held-out text, and count as documents in "
            "standard errors (data.holdout_by=section)": self.unit == "section" and not chose_unit,
            f"{_count(self.duplicates, 'document')} equal to one read before, not read again": self.duplicates,
            f"{_count(self.repeated_sections, 'section')} equal to one across the held-out split": (
                self.repeated_sections
            ),
            f"{_count(self.empty, 'row')} without text skipped": self.empty,
            f"{_count(self.hidden, 'hidden file or folder', 'hidden files and folders')} not read": self.hidden,
            f"{_count(self.own, 'file')} written by sae not read": self.own,
            f"not read, being no regular files: {irregular_in_words(self.irregular)}": self.irregular,
            f"not read, being of other kinds: {kinds_in_words(self.other_kinds)}": self.other_kinds,
            f"{_count(len(self.without_column), 'file')} without the column not read ({names})": self.without_column,
        }
        return [printable(f"data source {source!r}: {note}") for note, holds in notes.items() if holds]


def combined(parts: Sequence[Census]) -> dict[str, Any]:
    """Counts over all sources, for a manifest; only those that are not 0, except `duplicates`."""
    counts = {
        name: sum(getattr(part, name) for part in parts)
        for name in ("duplicates", "empty", "pretokenised", "chats", "repeated_sections")
    }
    units = [part.unit for part in parts]
    return {
        **{name: count for name, count in counts.items() if count or name == "duplicates"},
        **({"divided_by": units if len(units) > 1 else units[0]} if "section" in units else {}),
    }


def irregular_in_words(kinds: Counter[str]) -> str:
    """`2 links to folders, 1 named pipe`."""
    return ", ".join(_count(count, kind, _SEVERAL.get(kind)) for kind, count in kinds.most_common())


def kinds_in_words(kinds: Counter[str]) -> str:
    """`12 of '.pdf', 1 of no suffix`."""
    listed = [
        f"{count:,} of {repr(suffix) if suffix.startswith('.') else suffix}" for suffix, count in kinds.most_common(8)
    ]
    return ", ".join(listed) + (f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else "")


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"1 {one}" if number == 1 else f"{number:,} {several or one + 's'}"
