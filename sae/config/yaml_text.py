"""YAML text parsed within limits: no repeated keys, and nothing larger or deeper than settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from sae.errors import ConfigError
from sae.files.printable import one_line

LONGEST = 300
"""Maximum characters of a value, or of the library's message, in an error."""
_MOST_VALUES = 10_000


class _EachKeyOnce(yaml.SafeLoader):
    """Loader that refuses repeated keys, which would lose a value."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ComposerError(None, None, f"{key.value!r} is repeated", key.start_mark)
            seen.add(key.value)
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count nodes as often as aliases repeat them, so that ten lines cannot expand to a billion values."""
        node: Any = super().compose_node(parent, index)
        inner = node.value if isinstance(node.value, list) else []
        parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
        node.size = 1 + sum(part.size for part in parts)
        if node.size > _MOST_VALUES:
            raise ComposerError(None, None, f"more than {_MOST_VALUES:,} values, aliases counted", node.start_mark)
        return node


def parsed(text: str) -> Any:
    """Parse YAML text.

    Raises:
        yaml.YAMLError: the text is not YAML, is too large or too deep, repeats a key, or has too long a number.
    """
    try:
        return yaml.load(text, _EachKeyOnce)
    except RecursionError as error:
        raise yaml.YAMLError("too deep") from error
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError) as error:
        raise yaml.YAMLError(f"invalid value: {one_line(str(error), LONGEST)}") from error


def parse_file(path: Path, content: bytes) -> Any:
    """Parse the content of a YAML file.

    Raises:
        ConfigError: the content is not YAML, repeats a key, or is too large or too deep.
    """
    try:
        return parsed(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {str(path)!r}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {str(path)!r}: not YAML ({one_line(str(error), LONGEST)})") from error
