"""Token text made fit to be shown on one line."""

from __future__ import annotations

_SIGNS = {ord("\n"): "↵", ord("\r"): "␍", ord("\t"): "→"}
_HARMFUL = dict.fromkeys([*range(32), *range(127, 160), *range(8234, 8239), *range(8294, 8298)], "�")
_PART_OF_CHARACTER = "◌"


def visible(token: str) -> str:
    """A token's text on one line: line ends and tabs as signs, control characters replaced."""
    return (token or _PART_OF_CHARACTER).translate(_HARMFUL | _SIGNS)
