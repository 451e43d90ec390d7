"""Paths that users write, and names made from them."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath


def expanded(path: str | Path) -> Path:
    """The path with a leading `~` expanded to the home folder; unchanged if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve(name: str | Path, part: str, index: str) -> Path | None:
    """The local folder that a user's name stands for: the one that holds the file `index`. Nothing is opened.

    Args:
        name: a folder's path, or that of the run folder with the folder in it.
        part: the folder's name in a run folder.
        index: the file that makes it such a folder.

    Returns:
        None if neither holds the file.
    """
    folder = expanded(name)
    return next((place for place in (folder, folder / part) if os.path.lexists(place / index)), None)


def name_of(path: PurePath | str) -> str:
    r"""A path as text that can be written as UTF-8: undecodable bytes become escapes such as `\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def short_name(name: str) -> str:
    """A prefix for file names, made from a name that a user chose: at most 40 letters, digits, `_` and `-`.

    Different names may become equal.
    """
    return re.sub(r"[^\w-]+", "_", name)[:40]
