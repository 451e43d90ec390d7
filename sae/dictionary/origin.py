"""Where a dictionary belongs: whether it was trained on the hook point and the model that it is to be used with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sae.dictionary.base import Dictionary
from sae.dictionary.model_identity import differs
from sae.dictionary.sites import Hooks
from sae.errors import ConfigError, SaeError

OF_WEIGHTS = ("weights_sha256", "weight_processing")
"""What two models must share if activations of one are to be encoded by a dictionary of the other."""
OF_COMPUTATION = ("config_sha256", "code_sha256")
"""What they must share beside it, where both are known: the same weights can be computed with in another way."""


@dataclass(frozen=True)
class Place:
    """Where a dictionary is to be used.

    Attributes:
        name: of the cache or the model, for messages.
        model: what is known of the model: the entries of `ModelInfo`.
        error: what is raised if the model is another.
        width: of the activations at a hook point; None: not known.
        model_keys: entries that must be those of training; those of `OF_COMPUTATION` must be too.
    """

    name: str
    model: Mapping[str, Any]
    error: type[SaeError]
    width: Callable[[str], int] | None = None
    model_keys: Sequence[str] = OF_WEIGHTS


def check_belongs(
    dictionary: Dictionary, place: Place, *, reads: str | None = None, gives: str | None = None
) -> None:  # fmt: skip
    """Refuse a dictionary that was trained elsewhere. What its metadata does not say is not checked.

    Args:
        dictionary: what is to be used.
        place: where.
        reads: hook point whose activations it is to encode.
        gives: hook point whose activations it is to reconstruct.

    Raises:
        ConfigError: it was trained on another hook point, or takes activations of another width.
        SaeError: of the class that the place names: it was trained on another model.
    """
    hooks = Hooks.of(dictionary.metadata)
    for asked, trained, does in ((reads, hooks.reads, "reads"), (gives, hooks.gives, "gives")):
        if asked is not None and trained is not None and asked != trained:
            did = f"{does} activations of" if hooks.of_transcoder else "was trained on"
            raise ConfigError(
                f"hook {asked!r}: the dictionary {did} {trained!r}; use it there, with a cache that has it"
            )
    for part in ("model", "target_model"):
        _check_model(dictionary.metadata.get(part), place)
    for hook in dict.fromkeys((reads, gives, hooks.read_elsewhere if gives is not None else None)):
        if hook is not None and place.width is not None and place.width(hook) != dictionary.d_in:
            raise ConfigError(
                f"hook {hook!r}: activations have {place.width(hook):,} numbers, the dictionary takes "
                f"{dictionary.d_in:,}; give the hook point and the model it was trained on"
            )


def _check_model(trained_on: Any, place: Place) -> None:
    if not isinstance(trained_on, Mapping):
        return
    for key in place.model_keys:
        if trained_on.get(key) not in (None, place.model.get(key)):
            raise place.error(_of_another(trained_on, place, key) + "; use the model that it was trained on")
    for key in OF_COMPUTATION:
        if differs(key, trained_on, place.model):
            raise place.error(
                _of_another(trained_on, place, key) + ", with the same weights; use the config.json and the code that "
                f"it was trained with, or delete {key} from the dictionary's metadata if the difference does not matter"
            )


def _of_another(trained_on: Mapping[str, Any], place: Place, key: str) -> str:
    return (
        f"{place.name}: of another model than the dictionary's: {key} is {place.model.get(key)!r} there and "
        f"{trained_on[key]!r} in training, on {trained_on.get('name')!r}"
    )
