"""Every error this package raises on purpose.

    SaeError
    ├── ConfigError    a setting is unknown, of the wrong type, or contradicts another
    ├── DataError      the text cannot be read, or there is too little of it
    ├── ModelError     the language model or the hook point cannot be had
    ├── CacheError     the activation cache is missing, damaged, of another model, or cannot be written
    ├── FormatError    a saved dictionary or feature store cannot be read
    │   ├── DamagedError  (a CacheError as well) a file is missing, damaged, changed, or no regular file
    │   └── UnreadableError  (a CacheError as well) the machine cannot read a file, which may be good
    ├── TrainingError  training cannot go on
    ├── TrainingInterrupted  no error: Ctrl-C, and the state is saved
    ├── ShapeError     activations have another width than the dictionary
    └── UnknownFeatureError  the dictionary has no feature of that number

Each message names the value, what was expected, and the way out; the command line prints it alone on one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn


class SaeError(Exception):
    """Root of all errors of this package."""


class ConfigError(SaeError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(SaeError):
    """The text cannot be read, or there is too little of it."""


class ModelError(SaeError):
    """The language model or the hook point cannot be had."""


class CacheError(SaeError):
    """The activation cache is missing, damaged, of another model, or cannot be written."""


class FormatError(SaeError):
    """A saved dictionary or feature store cannot be read."""


class DamagedError(FormatError, CacheError):
    """A file that the toolkit wrote is missing, differs from its hash, cannot be parsed, or is no regular file."""


class UnreadableError(FormatError, CacheError):
    """A file cannot be read, and not through a fault of its own: permissions, memory, open files, the path's name."""


class TrainingError(SaeError):
    """Training cannot go on: not-a-number values, activations of the wrong width, no data."""


class TrainingInterrupted(SaeError):  # noqa: N818  it is no error
    """Ctrl-C: the state is saved, and the same command goes on."""


class ShapeError(SaeError, ValueError):
    """Activations have another width than the dictionary."""


class UnknownFeatureError(SaeError, IndexError):
    """The dictionary has no feature of that number."""


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """A module's `__getattr__` that answers an old name with the new one."""

    def missing(name: str) -> NoReturn:
        now = f": it is called {names[name]!r} now" if name in names else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{now}")

    return missing
