"""Tables of releases and of the dictionaries in one, with the numbers published with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae.hub import RELEASES, Listing, list_dictionaries
from sae.results.table import NONE, Column, Table

if TYPE_CHECKING:
    from rich.console import Group

_THEIRS = (
    "L0 and the share of the variance that is explained are theirs: by the definitions of those who published them, on "
    "other tokens than yours. 'sae compare' measures them anew."
)


def releases_table(width: int | None = None) -> Group:
    """The releases that have a short name.

    Args:
        width: of the terminal, in characters; None: wide enough.
    """
    rows = [
        (name, release.repository + f"/{release.folder}" * bool(release.folder), release.model,
         str(len(release.paths)) if release.paths else NONE)
        for name, release in RELEASES.items()
    ]  # fmt: skip
    heads = ("release", "repository", "language model", "dictionaries")
    columns = [
        Column(head, [row[number] for row in rows], is_text=number < 3, is_extra=number == 1)
        for number, head in enumerate(heads)
    ]
    note = f"'sae list RELEASE' shows the dictionaries of one; {NONE}: the hub is asked for them."
    return Table(columns, notes=[note]).in_terminal(width)


def dictionaries_table(name: str, width: int | None = None) -> Group:
    """The dictionaries of a release or a repository.

    Args:
        name: what `sae.hub.list_dictionaries` takes.
        width: of the terminal, in characters; None: wide enough.

    Raises:
        FormatError: the name stands for nothing, or the hub does not give the repository.
    """
    listing = list_dictionaries(name)
    entries = listing.entries
    columns = [
        Column("dictionary", [entry.id or "(the repository's top)" for entry in entries], is_text=True),
        Column("L0\n(theirs)", [_number(entry.numbers.l0) for entry in entries]),
        Column("explained\n(theirs)", [_number(entry.numbers.variance_explained) for entry in entries]),
        Column("from", [entry.source or NONE for entry in entries], is_text=True),
    ]
    model = f", language model {listing.model}" if listing.model else ""
    count = "1 dictionary" if len(entries) == 1 else f"{len(entries):,} dictionaries"
    title = f"{listing.repository}{model}: {count}"
    return Table(columns, title=title, notes=[*listing.notes, *_notes(listing)]).in_terminal(width)


def _notes(listing: Listing) -> list[str]:
    example = f"sae.load({listing.entries[0].name!r}) loads the first one."
    return [example, *([_THEIRS] if any(entry.source for entry in listing.entries) else [])]


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"
