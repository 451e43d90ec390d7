"""A dictionary's two hook points: the one it reads, and the one it reconstructs; they differ for a transcoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae.dictionary import hook_points
from sae.errors import ConfigError


@dataclass(frozen=True)
class Hooks:
    """The hook points of a dictionary; None if its metadata does not say.

    Attributes:
        reads: the hook point it encodes.
        gives: the hook point it reconstructs; the same, except for a transcoder.
    """

    reads: str | None
    gives: str | None

    @property
    def of_transcoder(self) -> bool:
        """Whether the two differ."""
        return self.reads != self.gives

    @property
    def read_elsewhere(self) -> str | None:
        """The hook point a transcoder reads; None if the dictionary reads the one it reconstructs."""
        return self.reads if self.of_transcoder else None

    @staticmethod
    def of(metadata: dict[str, Any], hook: str | None = None, target_hook: str | None = None) -> Hooks:
        """Hook points from `hook` and `target_hook` of a dictionary's metadata, unless given as arguments.

        Raises:
            ConfigError: a target without a hook point to read, or a target that comes before it.
        """
        reads = hook or _text(metadata.get("hook"))
        gives = target_hook or _text(metadata.get("target_hook")) or reads
        hooks = Hooks(reads, gives)
        if hooks.of_transcoder:
            hooks.check()
        return hooks

    def check(self) -> None:
        """Raise ConfigError unless the model computes `reads` before `gives`."""
        if self.reads is None:
            raise ConfigError(
                f"target hook {self.gives!r}: the transcoder does not say which hook point it reads: give "
                "hook='blocks.N.…'"
            )
        assert self.gives is not None
        if place_in_model(self.gives) < place_in_model(self.reads):
            raise ConfigError(
                f"target hook {self.gives!r} comes before {self.reads!r}, which the transcoder reads: a later "
                "activation cannot give an earlier one; swap them"
            )


def _text(entry: Any) -> str | None:
    """An entry of the metadata if it is text, else None."""
    return entry if isinstance(entry, str) else None


def place_in_model(hook: str) -> tuple[int, int]:
    """Block and position in it; they order hook points as the model computes them.

    Raises:
        ConfigError: not a hook point.
    """
    place = hook_points.place_in_model(hook)
    if place is None:
        raise ConfigError(hook_points.no_hook_point(hook))
    return place
