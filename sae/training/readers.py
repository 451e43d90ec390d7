"""Settings that only some architectures read, and what becomes of one that nobody would."""

from __future__ import annotations

from collections.abc import Collection

from sae.config import DictionaryConfig, TrainConfig
from sae.errors import ConfigError

PENALISED = ("relu", "gated", "jumprelu")
"""Architectures in which a penalty keeps features from firing."""
SELECTED = ("topk", "batch_topk", "matryoshka")
"""Architectures in which a rule says how many fire."""
READERS: dict[str, tuple[str, ...]] = {
    "dictionary.prefixes": ("matryoshka",),
    "train.l1_coefficient": ("relu", "gated"),
    "train.l0_coefficient": ("jumprelu",),
    "train.bandwidth": ("jumprelu",),
    "train.sparsity_warmup_fraction": PENALISED,
    "train.k_aux": (*SELECTED, "gated", "jumprelu"),
}


def unread(shape: DictionaryConfig, settings: TrainConfig) -> dict[str, object]:
    """Settings that were chosen and that this architecture does not read, with their values."""
    parts = {"dictionary": shape, "train": settings}
    found: dict[str, object] = {}
    for key, readers in READERS.items():
        section, _, name = key.partition(".")
        value = getattr(parts[section], name)
        if shape.architecture not in readers and value != type(parts[section]).model_fields[name].default:
            found[key] = value
    if settings.products == "bfloat16" and shape.architecture not in SELECTED:
        found["train.products"] = settings.products
    return found


def check_read(shape: DictionaryConfig, settings: TrainConfig) -> None:
    """Refuse what would have no effect.

    Raises:
        ConfigError: naming the architectures that the setting is for.
    """
    for key, value in unread(shape, settings).items():
        raise no_reader(key, value, (shape.architecture,))


def no_reader(key: str, value: object, architectures: Collection[str]) -> ConfigError:
    """What to say of a setting that none of these architectures reads."""
    readers = ", ".join(READERS.get(key.removeprefix("sweep."), SELECTED))
    return ConfigError(
        f"{key}={value!r} has no effect on {', '.join(architectures)}, only on {readers}: take it out, or choose "
        "another dictionary.architecture"
    )
