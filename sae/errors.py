"""Every error this package raises on purpose.

    SaeError
    ├── ConfigError    a setting is unknown, of the wrong type, or contradicts another
    ├── DataError      the text cannot be read, or there is too little of it
    ├── ModelError     the language model or the hook point is not available
    ├── CacheError     the activation cache is missing, damaged, from another model, or cannot be written
    ├── FormatError    a saved dictionary or feature store cannot be read
    │   ├── DamagedError  (also a CacheError) a file is missing, damaged, changed, or not a regular file
    │   └── UnreadableError  (also a CacheError) the machine cannot read a file, which may be intact
    ├── TrainingError  training cannot continue
    ├── TrainingInterrupted  not an error: Ctrl-C, and the state is saved
    ├── ShapeError     activations and dictionary differ in width
    └── UnknownFeatureError  the dictionary has no feature with that number

Each message names the value, what was expected, and the way out; the command line prints it alone on one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn


class SaeError(Exception):
    """Base class of all errors of this package."""


class ConfigError(SaeError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(SaeError):
    """The text cannot be read, or there is too little of it."""


class ModelError(SaeError):
    """The language model or the hook point is not available."""


class CacheError(SaeError):
    """The activation cache is missing, damaged, from another model, or cannot be written."""


class FormatError(SaeError):
    """A saved dictionary or feature store cannot be read."""


class DamagedError(FormatError, CacheError):
    """A file that the toolkit wrote is missing, differs from its hash, cannot be parsed, or is not a regular file."""


class UnreadableError(FormatError, CacheError):
    """A file cannot be read for reasons outside it: permissions, memory, too many open files, the path's name."""


class TrainingError(SaeError):
    """Training cannot continue: not-a-number values, activations of the wrong width, no data."""


class TrainingInterrupted(SaeError):  # noqa: N818  not an error
    """Ctrl-C: the state is saved, and the same command continues from it."""


class ShapeError(SaeError, ValueError):
    """Activations and dictionary differ in width."""


class UnknownFeatureError(SaeError, IndexError):
    """The dictionary has no feature with that number."""


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """Return a module's `__getattr__` that raises AttributeError and, for an old name, states the new one."""

    def missing(name: str) -> NoReturn:
        hint = f": it is called {names[name]!r} now" if name in names else ""
        raise AttributeError(f"module {module!r} has no attribute {name!r}{hint}")

    return missing


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Put a name, such as a dictionary's, in front of error messages."""
    try:
        yield
    except SaeError as error:
        raise type(error)(f"{name}: {error}") from error
