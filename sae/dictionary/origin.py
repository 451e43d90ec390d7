"""Checks that a dictionary was trained on the hook point and model it is used with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae.dictionary.base import Dictionary
from sae.dictionary.model_identity import differs
from sae.dictionary.sites import Hooks
from sae.errors import ConfigError, SaeError

WEIGHT_KEYS = ("weights_sha256", "weight_processing")
"""Entries that two models must share if a dictionary of one is used on activations of the other."""
COMPUTATION_KEYS = ("config_sha256", "code_sha256")
"""Entries that must be equal too, if both are known: the same weights can be computed with in different ways."""


@dataclass(frozen=True)
class Place:
    """Where a dictionary is used.

    Attributes:
        name: name of the cache or the model, for messages.
        model: known facts about the model: the entries of `ModelInfo`.
        error: error to raise if the model differs.
        width: returns the width of the activations at a hook point; None: unknown.
        model_keys: entries that must be the same as in training, in addition to `COMPUTATION_KEYS`.
    """

    name: str
    model: Mapping[str, Any]
    error: type[SaeError]
    width: Callable[[str], int] | None = None
    model_keys: Sequence[str] = WEIGHT_KEYS


def check_belongs(
    dictionary: Dictionary, place: Place, *, reads: str | None = None, gives: str | None = None
) -> None:  # fmt: skip
    """Refuse a dictionary that was trained elsewhere. Facts missing from its metadata are not checked.

    Args:
        dictionary: the dictionary to use.
        place: where it is used.
        reads: hook point whose activations it encodes there.
        gives: hook point whose activations it reconstructs there.

    Raises:
        ConfigError: it was trained on another hook point, or takes activations of another width.
        SaeError: it was trained on another model; the class is `place.error`.
    """
    hooks = Hooks.of(dictionary.metadata)
    for hook, trained_hook, verb in ((reads, hooks.reads, "reads"), (gives, hooks.gives, "gives")):
        if hook is not None and trained_hook is not None and hook != trained_hook:
            relation = f"{verb} activations of" if hooks.of_transcoder else "was trained on"
            raise ConfigError(
                f"hook {hook!r}: the dictionary {relation} {trained_hook!r}; use it there, with a cache that has it"
            )
    for part in ("model", "target_model"):
        _check_model(dictionary.metadata.get(part), place)
    for hook in dict.fromkeys((reads, gives, hooks.read_elsewhere if gives is not None else None)):
        if hook is not None and place.width is not None and place.width(hook) != dictionary.d_in:
            raise ConfigError(
                f"hook {hook!r}: activations have {place.width(hook):,} numbers, the dictionary takes "
                f"{dictionary.d_in:,}; give the hook point and model it was trained on"
            )


def _check_model(trained_on: Any, place: Place) -> None:
    if not isinstance(trained_on, Mapping):
        return
    for key in place.model_keys:
        if trained_on.get(key) not in (None, place.model.get(key)):
            raise place.error(_mismatch(trained_on, place, key) + "; use the model it was trained on")
    for key in COMPUTATION_KEYS:
        if differs(key, trained_on, place.model):
            raise place.error(
                _mismatch(trained_on, place, key) + ", with the same weights; use the config.json and the code that "
                f"it was trained with, or delete {key} from the dictionary's metadata if the difference does not matter"
            )


def _mismatch(trained_on: Mapping[str, Any], place: Place, key: str) -> str:
    return (
        f"{place.name}: not the dictionary's model: {key} is {place.model.get(key)!r} there and "
        f"{trained_on[key]!r} in training, on {trained_on.get('name')!r}"
    )
