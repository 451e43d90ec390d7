"""A transcoder's two hook points: the one that it reads, and the one whose activations it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae.dictionary import hook_points
from sae.errors import ConfigError


@dataclass(frozen=True)
class Hooks:
    """Where a dictionary belongs; None is what its metadata does not say.

    Attributes:
        reads: the hook point that it encodes.
        gives: the one that it reconstructs: the same, but for a transcoder.
    """

    reads: str | None
    gives: str | None

    @property
    def of_transcoder(self) -> bool:
        """Whether they differ."""
        return self.reads != self.gives

    @property
    def read_elsewhere(self) -> str | None:
        """What a transcoder reads; None where a dictionary reads what it gives."""
        return self.reads if self.of_transcoder else None

    @staticmethod
    def of(metadata: dict[str, Any], hook: str | None = None, target_hook: str | None = None) -> Hooks:
        """From `hook` and `target_hook` of a dictionary's metadata, unless others are given.

        Raises:
            ConfigError: a target without a hook point that is read, or one that comes before it.
        """
        reads = hook or _text(metadata.get("hook"))
        gives = target_hook or _text(metadata.get("target_hook")) or reads
        hooks = Hooks(reads, gives)
        if hooks.of_transcoder:
            hooks.check()
        return hooks

    def check(self) -> None:
        """Raise ConfigError unless the model computes what is read before what is given."""
        if self.reads is None:
            raise ConfigError(
                f"target hook {self.gives!r}: the transcoder does not say which hook point it reads: give "
                "hook='blocks.N.…'"
            )
        assert self.gives is not None
        if place_in_model(self.gives) < place_in_model(self.reads):
            raise ConfigError(
                f"target hook {self.gives!r} comes before {self.reads!r}, which the transcoder reads: what is computed "
                "later cannot give what is earlier; exchange them"
            )


def _text(entry: Any) -> str | None:
    """What a record says, where it is a name at all."""
    return entry if isinstance(entry, str) else None


def place_in_model(hook: str) -> tuple[int, int]:
    """Block, and the place in it, by which hook points are ordered as the model computes them.

    Raises:
        ConfigError: not a hook point.
    """
    place = hook_points.place_in_model(hook)
    if place is None:
        raise ConfigError(hook_points.no_hook_point(hook))
    return place
