"""Which architectures read which settings; one that would have no effect is refused."""

from __future__ import annotations

from collections.abc import Collection

from sae.config.settings import DictionaryConfig, TrainConfig
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
    "train.encoder_dtype": SELECTED,
}
"""Every other setting is read by all."""


def unread(shape: DictionaryConfig, settings: TrainConfig) -> dict[str, object]:
    """Settings that were chosen and that this architecture does not read, with their values."""
    parts = {"dictionary": shape, "train": settings}
    found: dict[str, object] = {}
    for key, readers in READERS.items():
        section, _, name = key.partition(".")
        value = getattr(parts[section], name)
        no_choice = (
            type(parts[section]).model_fields[name].default,
            "float32",
        )  # what encoder_dtype is without a choice
        if shape.architecture not in readers and value not in no_choice:
            found[key] = value
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
    readers = ", ".join(READERS[key.removeprefix("sweep.")])
    return ConfigError(
        f"{key}={value!r} has no effect on {', '.join(architectures)}, only on {readers}: take it out, or train "
        "these apart"
    )
