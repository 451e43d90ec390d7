"""Paths as a user writes them."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath


def expanded(path: str | Path) -> Path:
    """The path with a leading `~` as the home folder; as it stands, if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def name_of(path: PurePath | str) -> str:
    r"""A path as text that can be written as UTF-8: bytes that are no text become escapes such as `\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def short_name(name: str) -> str:
    """What the name of a file that is written may begin with, from a name that somebody chose: letters, digits, `_` and
    `-`, at most 40 of them. Different names may become equal.
    """
    return re.sub(r"[^\w-]+", "_", name)[:40]
