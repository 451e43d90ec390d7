"""Patterns of hook points in a configuration, such as `blocks.*.hook_mlp_out`, and the names that they stand for."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sae.config.file import parse_config
from sae.config.settings import RunConfig, is_pattern
from sae.errors import ConfigError

_SIDES = ("reads", "gives")


def has_patterns(config: RunConfig) -> bool:
    """Whether the configuration has patterns of hook points."""
    settings = config.model_dump(mode="json")
    named = (settings["harvest"]["hooks"], *(section.get(key) for _, section in _sections(settings) for key in _SIDES))
    return any(is_pattern(hook) for hooks in named for hook in _listed(hooks))


def with_hook_points(config: RunConfig, names: Callable[[], Iterable[str]]) -> RunConfig:
    """The configuration with every pattern of hook points replaced by those that match it, in their order.

    In a pattern, `*` stands for any text, `?` for one character, and `[0-3]` for one of these. Patterns in
    `harvest.hooks` are matched with the hook points that there are, others with those in `harvest.hooks`, by blocks, so
    that patterns for the two sides of transcoders give hook points of the same blocks in the same order.

    Args:
        config: the configuration.
        names: returns the hook points that there are; called only if `harvest.hooks` has a pattern.

    Raises:
        ConfigError: no hook point matches a pattern, or the settings contradict each other.
    """
    settings = config.model_dump(mode="json")
    harvested = config.harvest.hooks
    if any(map(is_pattern, harvested)):
        harvested = settings["harvest"]["hooks"] = _matching("harvest.hooks", harvested, list(names()))
    for prefix, section in _sections(settings):
        for key in _SIDES:
            entries = _listed(section.get(key))
            if any(map(is_pattern, entries)):
                section[key] = _matching(f"{prefix}dictionary.{key}", entries, sorted(harvested, key=_block))
    return parse_config(settings)


def _block(hook: str) -> int:
    """The number of the block in a hook point's name; −1 if there is none."""
    match = re.search(r"\d+", hook)
    return int(match[0]) if match else -1


def _sections(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections whose `reads` and `gives` name hook points, each after the beginning of its key."""
    yield "", settings["dictionary"]
    swept = settings["sweep"].get("dictionary")
    if isinstance(swept, dict):  # anything else is refused where the sweep is read
        yield "sweep.", swept


def _listed(hooks: Any) -> Sequence[Any]:
    return hooks if isinstance(hooks, list | tuple) else [hooks]


def _matching(key: str, entries: Iterable[Any], names: Iterable[str]) -> list[Any]:
    """Entries, with the names that match in place of each pattern; each name once."""
    hooks: list[Any] = []
    for entry in entries:
        matches = [name for name in names if fnmatch.fnmatchcase(name, entry)] if is_pattern(entry) else [entry]
        if not matches:
            raise ConfigError(
                f"{key}: no hook point matches {entry!r}; "
                + ("'sae hooks MODEL' lists them" if key == "harvest.hooks" else f"there are {', '.join(names)}")
            )
        hooks += [match for match in matches if match not in hooks]
    return hooks
