"""A dictionary's origin: hook points, model, tokens and text of its training; and a check that it is used there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sae.dictionary.model_identity import differs
from sae.dictionary.sites import Sites, check_order
from sae.errors import ConfigError, SaeError

VERSION = 2
"""Version of an origin in metadata. Version 1, which has no number, holds `hook`, `target_hook` and `target_model`."""
WEIGHT_KEYS = ("weights_sha256", "weight_processing")
"""Entries that two models must share if a dictionary of one is used on activations of the other."""
_WEIGHTS = WEIGHT_KEYS[0]
COMPUTATION_KEYS = ("config_sha256", "code_sha256")
"""Entries that must be equal too, if both are known: the same weights can be computed with in different ways."""
_TARGET = "target"
"""Name of the model that a transcoder's target comes from, if it is not the model of the input."""
_SHORT = ("hook", "target_hook")
_FACTS = ("tokens", "context_length", "data", "activations", "target_activations", "activation_dtype")


@dataclass(frozen=True)
class Origin:
    """What a dictionary was trained on. Facts that its metadata does not contain are None.

    Attributes:
        reads: the sites it encodes.
        gives: the sites it reconstructs; the same, except for a transcoder.
        models: facts about each model, the entries of `ModelInfo`, by the model of a site; empty if there is only one.
        tokens: which tokens counted, as JSON of a `TokenPolicy`.
        context_length: tokens per context.
        data: where the text comes from.
        activations: hash of everything that determined the activations that it reads.
        target_activations: the same for those that it gives, for a transcoder.
        activation_dtype: number type in which they were stored.
        transcodes: whether its weights are a transcoder's, even if it is unknown which sites it reads and gives.
    """

    reads: Sites
    gives: Sites
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens: Any = None
    context_length: int | None = None
    data: Mapping[str, Any] | None = None
    activations: str | None = None
    target_activations: str | None = None
    activation_dtype: str | None = None
    transcodes: bool = field(default=False, compare=False)

    @staticmethod
    def of(metadata: Mapping[str, Any], d_in: int | None = None, d_out: int | None = None) -> Origin:
        """The origin that a dictionary's metadata states.

        `hook` and `target_hook` are a short form for a single site each. They are read if they are given, and are all
        that version 1 has: without `origin_version`, entries called `reads` and `gives` are a user's own.

        Args:
            metadata: the metadata.
            d_in: the width of what the dictionary reads, which is that of a single site.
            d_out: the width of what a transcoder gives. None: unknown, or d_in; then the metadata alone says whether it
                is a transcoder.

        Raises:
            ConfigError: the version is newer than this package, or an entry is of another form.
        """
        version, has_sites = metadata.get("origin_version", 1), "origin_version" in metadata
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ConfigError(
                f"metadata has origin_version={version!r}, but this version of sae knows 1 to {VERSION}: update sae, "
                "or correct the number"
            )
        try:
            reads = Sites.from_json(metadata["reads"]) if has_sites and "reads" in metadata else Sites.one(None)
            gives = Sites.from_json(metadata["gives"]) if has_sites and "gives" in metadata else reads
        except ValueError as error:
            raise ConfigError(f"metadata has reads or gives of another form: {error}") from error
        models = {"": metadata.get("model"), _TARGET: metadata.get("target_model")}
        models |= _part(metadata, "models") if has_sites else {}
        if d_out is not None and gives == reads:
            gives = Sites.one(None)
        origin = Origin(
            reads,
            gives,
            {name: facts for name, facts in models.items() if isinstance(facts, Mapping)},
            **{key: metadata.get(key) for key in _FACTS},
            transcodes=d_out is not None,
        )
        hook, target_hook = (name if isinstance(name := metadata.get(key), str) else None for key in _SHORT)
        origin = origin._at(hook, target_hook)
        gives = origin.gives.of_width(d_in if d_out is None else d_out)
        return replace(origin, reads=origin.reads.of_width(d_in), gives=gives)

    def to_json(self) -> dict[str, Any]:
        """The entries of a dictionary's metadata, without unknown facts."""
        facts = {
            "reads": self.reads.to_json(),
            "gives": self.gives.to_json(),
            "model": self.models.get(""),
            "models": {name: facts for name, facts in self.models.items() if name} or None,
            **{key: getattr(self, key) for key in _FACTS},
        }
        return {"origin_version": VERSION, **{key: value for key, value in facts.items() if value is not None}}

    @property
    def of_transcoder(self) -> bool:
        """Whether it gives other sites than it reads."""
        return self.transcodes or self.reads != self.gives

    @property
    def read_elsewhere(self) -> str | None:
        """The hook point a transcoder reads; None if the dictionary reads the one it reconstructs."""
        return self.reads.hook if self.of_transcoder else None

    def at(self, hook: str | None = None, target_hook: str | None = None) -> Origin:
        """The same origin at other hook points; None for the ones it has.

        Raises:
            ConfigError: the model computes the target before the hook point to read, or that one is unknown.
        """
        origin = self._at(hook, target_hook)
        check_order(origin.reads, origin.gives)
        return origin

    def _at(self, hook: str | None, target_hook: str | None) -> Origin:
        reads = self.reads if hook is None else Sites.one(hook)
        gives = self.gives if self.of_transcoder else reads
        if target_hook is not None:
            gives = Sites.one(target_hook, model=_TARGET if _TARGET in self.models else "")
        return replace(self, reads=reads, gives=gives)

    def giving(self, target: Origin) -> Origin:
        """The origin of a transcoder from these activations to those that `target` reads.

        Raises:
            ConfigError: the model computes the target before the input.
        """
        model, models = "", self.models
        if target.models.get("") != models.get(""):
            model, models = _TARGET, {**models, _TARGET: target.models.get("", {})}
        gives = Sites(tuple(replace(site, model=model) for site in target.reads))
        check_order(self.reads, gives)
        return replace(self, gives=gives, models=models, target_activations=target.activations)


def in_current_form(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A dictionary's metadata with its origin in the current version's form.

    Raises:
        ConfigError: the origin cannot be read.
    """
    others = {key: value for key, value in metadata.items() if key not in (*_SHORT, "target_model", "origin_version")}
    return {**others, **Origin.of(metadata).to_json()} if metadata else {}


def dead_in_training(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """How many features were dead when training ended, and after how many tokens a feature counts as dead.

    Returns:
        `features` and `tokens`; None if it is unknown, or if training was too short for a feature to count as dead.
    """
    trained = _part(metadata, "trained")
    dead, after, tokens = (trained.get(key) for key in ("dead", "dead_after_tokens", "tokens"))
    if not (isinstance(dead, int) and isinstance(after, int) and isinstance(tokens, int)) or tokens < after:
        return None
    return {"features": dead, "tokens": after}


def _part(metadata: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = metadata.get(key)
    return part if isinstance(part, Mapping) else {}


@dataclass(frozen=True)
class Place:
    """Where a dictionary is used.

    Attributes:
        name: name of the cache or the model, for messages.
        model: known facts about the model: the entries of `ModelInfo`.
        error: error to raise if the model differs.
        width: returns the width of the activations at a hook point; None: unknown.
        model_keys: entries that must be the same as in training, in addition to `COMPUTATION_KEYS`.
        weights_in: returns `weights_sha256` of the model's weights in another number type, such as `float32`; None if
            they cannot be hashed. None: unknown.
    """

    name: str
    model: Mapping[str, Any]
    error: type[SaeError]
    width: Callable[[str], int] | None = None
    model_keys: Sequence[str] = WEIGHT_KEYS
    weights_in: Callable[[str], str | None] | None = None


def check_belongs(
    origin: Origin, place: Place, *, reads: str | None = None, gives: str | None = None
) -> None:  # fmt: skip
    """Refuse a dictionary that was trained elsewhere. Facts missing from its metadata are not checked.

    Args:
        origin: the dictionary's origin.
        place: where it is used.
        reads: hook point whose activations it encodes there.
        gives: hook point whose activations it reconstructs there.

    Raises:
        ConfigError: it was trained on another hook point, takes activations of another width, or gives a hook point
            that comes before the one it reads; or it is a transcoder, and what it reads is unknown.
        SaeError: it was trained on another model; the class is `place.error`.
    """
    check_order(origin.reads, origin.gives)
    if gives is not None:
        check_sites(origin, gives)
    for hook, trained_hook, verb in ((reads, origin.reads.hook, "reads"), (gives, origin.gives.hook, "gives")):
        if hook is not None and trained_hook is not None and hook != trained_hook:
            relation = f"{verb} activations of" if origin.of_transcoder else "was trained on"
            raise ConfigError(
                f"hook {hook!r}: the dictionary {relation} {trained_hook!r}; use it there, with a cache that has it"
            )
    for model in origin.models.values():
        _check_model(model, place)
    if place.width is None:
        return
    read = origin.read_elsewhere if gives is not None else None
    for hook, width, verb in (
        (reads, origin.reads.width, "takes"), (gives, origin.gives.width, "gives"), (read, origin.reads.width, "takes"),
    ):  # fmt: skip
        if hook is not None and width is not None and place.width(hook) != width:
            raise ConfigError(
                f"hook {hook!r}: activations have {place.width(hook):,} numbers, the dictionary "
                f"{verb if origin.of_transcoder else 'takes'} {width:,}; give "
                "the hook point and model it was trained on"
            )


def check_sites(origin: Origin, gives: str | None) -> None:
    """Refuse a transcoder whose hook points are not both known: it cannot be used as an autoencoder of one of them.

    Args:
        origin: the dictionary's origin.
        gives: hook point whose activations it reconstructs; None: unknown.

    Raises:
        ConfigError: it is a transcoder, and what it reads or gives is unknown, or both are the same hook point.
    """
    reads = origin.reads.hook
    if not origin.of_transcoder or (reads is not None and gives is not None and reads != gives):
        return
    known = gives if reads is None else reads
    unknown = (
        "which hook points it reads and gives"
        if known is None
        else "which other one it " + ("reads" if reads is None else "gives")
    )
    raise ConfigError(
        f"{f'hook {known!r}: ' if known else ''}the dictionary is a transcoder, and {unknown} is unknown; give both "
        "with hook= and target_hook= (--hook and --target), or set them in dictionary.metadata"
    )


def _check_model(trained_on: Mapping[str, Any], place: Place) -> None:
    for key in place.model_keys:
        if trained_on.get(key) in (None, place.model.get(key)):
            continue
        if key != _WEIGHTS or not differs("dtype", trained_on, place.model):
            raise place.error(_mismatch(trained_on, place, key) + "; use the model it was trained on")
        dtype = str(trained_on["dtype"])
        if place.weights_in is None or place.weights_in(dtype) != trained_on[key]:
            raise place.error(
                _mismatch(trained_on, place, key) + f"; weights are {place.model['dtype']} there and were {dtype} in "
                f"training, so this may be the same model: load it in {dtype} (model.dtype={dtype}), which will tell"
            )
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
