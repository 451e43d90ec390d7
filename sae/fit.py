"""Whether the settings of a dictionary and of its training fit together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sae.config import DictionaryConfig, TrainConfig
from sae.errors import ConfigError


def check_fit(shape: DictionaryConfig, settings: TrainConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: k exceeds d_sae, nested dictionaries do not nest, or the learning rate falls before it has risen.
    """
    if shape.k > shape.d_sae:
        raise ConfigError(f"dictionary.k={shape.k} exceeds dictionary.d_sae={shape.d_sae}: lower k or raise d_sae")
    if shape.architecture == "matryoshka":
        try:
            nested_sizes(shape.prefixes, shape.d_sae)
        except ValueError as error:
            raise ConfigError(f"dictionary.{error}") from error
    if settings.warmup_fraction + settings.decay_fraction > 1:
        raise ConfigError("train.warmup_fraction + train.decay_fraction exceed 1: lower one of them")


def nested_sizes(prefixes: Sequence[float], d_sae: int) -> tuple[int, ...]:
    """Numbers of features of nested dictionaries, from ascending shares of d_sae.

    Raises:
        ValueError: they do not nest.
    """
    sizes = [round(share * d_sae) for share in prefixes]
    if not sizes or sizes[0] < 1 or sizes[-1] != d_sae or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(
            f"prefixes={list(prefixes)}: expected ascending shares of d_sae={d_sae} that end in 1 and each add a "
            f"feature at least, and these are {sizes} features"
        )
    return tuple(sizes)
