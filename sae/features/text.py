"""Token text in a form that can be shown on one line."""

from __future__ import annotations

from sae.files.printable import UNFIT

_SIGNS = {ord("\n"): "↵", ord("\r"): "␍", ord("\t"): "→"}
_PART_OF_CHARACTER = "◌"


def visible(token: str) -> str:
    """A token's text on one line: line ends and tabs as signs, other control characters replaced."""
    return UNFIT.sub("�", (token or _PART_OF_CHARACTER).translate(_SIGNS))
