"""Refuses settings without effect: those that the classes of the architectures do not declare to read."""

from __future__ import annotations

from collections.abc import Collection

from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.errors import ConfigError

PENALISED = tuple(name for name, kind in ARCHITECTURES.items() if kind.penalty is not None)
"""Architectures in which a penalty keeps features from firing; in the others, a rule sets how many fire."""
_IN_ORDER = sorted(ARCHITECTURES, key=PENALISED.__contains__)
READERS: dict[str, tuple[str, ...]] = {
    key: tuple(name for name in _IN_ORDER if key in ARCHITECTURES[name].reads)
    for kind in ARCHITECTURES.values()
    for key in kind.reads
}
"""Architectures that read a setting; settings not listed here are read by all."""


def unread(config: DictionaryConfig, settings: TrainConfig) -> dict[str, object]:
    """Settings that differ from their defaults but are not read by this architecture, with their values."""
    parts = {"dictionary": config, "train": settings}
    ignored: dict[str, object] = {}
    for key, readers in READERS.items():
        section, _, name = key.partition(".")
        value = getattr(parts[section], name)
        ignorable = (type(parts[section]).model_fields[name].default, "float32")  # float32: encoder_dtype's no-op
        if config.architecture not in readers and value not in ignorable:
            ignored[key] = value
    return ignored


def check_read(config: DictionaryConfig, settings: TrainConfig) -> None:
    """Refuse settings that would have no effect.

    Raises:
        ConfigError: naming the architectures that read the setting.
    """
    for key, value in unread(config, settings).items():
        raise no_reader(key, value, (config.architecture,))


def no_reader(key: str, value: object, architectures: Collection[str]) -> ConfigError:
    """The error for a setting that none of these architectures reads."""
    readers = ", ".join(READERS[key.removeprefix("sweep.")])
    return ConfigError(
        f"{key}={value!r} has no effect on {', '.join(architectures)}, only on {readers}: take it out, or train "
        "these separately"
    )
