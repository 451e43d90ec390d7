"""The dictionaries of a sweep: every combination of the values, hook points in pairs; and their names."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sae.config.file import parse_config
from sae.config.settings import RunConfig
from sae.errors import ConfigError
from sae.files.writing import stands
from sae.training.traits import no_reader, unread

_SHARED = ("tokens", "batch_size", "pool_tokens", "log_every", "checkpoint_every", "shuffle_seed")
_SIDES = ("dictionary.reads", "dictionary.gives")
_WEIGHTS = ("train.l1_coefficient", "train.l0_coefficient")
MOST_VARIANTS = 1000
"""Maximum number of dictionaries in a sweep, since all train in one pass."""


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """Every combination of the values in `config.sweep`, named by the values, as its folder is.

    The hook points of transcoders, `dictionary.reads` and `dictionary.gives`, are paired in their order.

    Raises:
        ConfigError: `config.sweep` is empty, has a key that cannot be swept, a value that is not a list, hook points
            that cannot be paired, two combinations of the same name, or more than `MOST_VARIANTS` combinations.
    """
    axes = dict(_axes(config.sweep))
    if not axes:
        raise ConfigError(
            "sweep is empty: give lists of values, such as 'sweep.dictionary.k=[16,32]', or use 'sae run' for one "
            "dictionary"
        )
    choices = _choices(axes)
    count = math.prod(map(len, choices))
    if count > MOST_VARIANTS:
        product = " × ".join(f"{len(values)} of {' with '.join(values[0])}" for values in choices)
        raise ConfigError(
            f"sweep has {count:,} combinations ({product}), but at most {MOST_VARIANTS:,} are possible: give fewer "
            "values, or run several sweeps with one harvest.cache"
        )
    configs: dict[str, RunConfig] = {}
    base_settings = config.model_dump(mode="json", exclude={"sweep", "sweep_at_once"})
    if base_settings["train"]["shuffle_seed"] is None:
        base_settings["train"]["shuffle_seed"] = config.seed  # one order of activations for all
    for parts in itertools.product(*choices):
        values = {key: value for part in parts for key, value in part.items()}
        chosen = {key: values[key] for key in axes}
        name = _folder_name(config.folder, chosen)
        if name in configs:
            raise ConfigError(f"sweep has {name!r} twice: give every value once")
        settings = _copy(base_settings)
        for key, value in chosen.items():
            _put(settings, key.split("."), value)
        settings["out"] = str(Path(config.out) / name)
        settings["harvest"]["cache"] = str(config.cache_folder)
        configs[name] = parse_config(settings)
    return _without_unread(configs, axes)


def _choices(axes: Mapping[str, list[Any]]) -> list[list[dict[str, Any]]]:
    """What one value is chosen of independently of the others: the values of a key, or of both sides of transcoders.

    Raises:
        ConfigError: the sides have different numbers of hook points.
    """
    sides = {key: values for key, values in axes.items() if key in _SIDES}
    if len(sides) < len(_SIDES):
        sides = {}
    if len({len(values) for values in sides.values()}) > 1:
        numbers = " and ".join(f"sweep.{key} has {len(values)}" for key, values in sides.items())
        raise ConfigError(
            f"{numbers} hook points: they are paired in their order, one transcoder for each pair; give as many of one "
            "as of the other, or name a side that all share in the section dictionary"
        )
    pairs = [dict(zip(sides, pair, strict=True)) for pair in zip(*sides.values(), strict=True)]
    others = [[{key: value} for value in values] for key, values in axes.items() if key not in sides]
    return [*([pairs] if pairs else []), *others]


def _without_unread(configs: dict[str, RunConfig], swept: Collection[str]) -> dict[str, RunConfig]:
    """The variants, each without common settings that only the architectures of other variants read.

    Raises:
        ConfigError: no variant reads a setting; or a setting is swept that some do not read, which would give the same
            dictionary twice.
    """
    unread_by = {name: unread(variant.dictionary, variant.train) for name, variant in configs.items()}
    for key in dict.fromkeys(key for keys in unread_by.values() for key in keys):
        names = [name for name, keys in unread_by.items() if key in keys]
        if key in swept or len(names) == len(configs):
            architectures = dict.fromkeys(configs[name].dictionary.architecture for name in names)
            raise no_reader(f"{'sweep.' if key in swept else ''}{key}", unread_by[names[0]][key], architectures)
    return {name: _without(variant, unread_by[name]) for name, variant in configs.items()}


def _without(variant: RunConfig, keys: Collection[str]) -> RunConfig:
    """The variant with the default values of these settings."""
    settings = variant.model_dump(mode="json")
    for key in keys:
        section, _, setting = key.partition(".")
        del settings[section][setting]
    return parse_config(settings) if keys else variant


def variant_label(config: RunConfig, variant: RunConfig) -> str:
    """The swept settings that a point does not name itself."""
    named = ("seed", *(f"dictionary.{name}" for name in ("architecture", "reads", "gives", "d_sae", "k")), *_WEIGHTS)
    settings = variant.model_dump(mode="json")
    parts = []
    for key, _ in _axes(config.sweep):
        section, _, name = key.partition(".")
        if key not in named:
            parts.append(_label(key, settings[section][name]))
    return ", ".join(parts)


def _axes(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _axes(value, f"{path}.")
            continue
        if path != "seed" and path.split(".", maxsplit=1)[0] not in ("dictionary", "train"):
            raise ConfigError(f"sweep.{path}: only keys of dictionary and train, and seed, can be swept")
        if path.removeprefix("train.") in _SHARED:
            raise ConfigError(f"sweep.{path}: all dictionaries of a sweep share one pass, so {path} is one for all")
        if not isinstance(value, (list, tuple)) or not value:
            raise ConfigError(f"sweep.{path}={value!r}: expected a list of values, such as [16, 32]")
        yield path, list(value)


def _folder_name(folder: Path, chosen: Mapping[str, Any]) -> str:
    """The name of a dictionary's folder; the one that earlier versions gave it, if only that is there."""
    name, older = ("-".join(_label(key, value, joint) for key, value in chosen.items()) for joint in ("-", ""))
    return older if stands(folder / older) and not stands(folder / name) else name


def _label(key: str, value: Any, joint: str = "-") -> str:
    """A setting in names of folders and lines: `k16`, `encoder_dtype-float32`, and some values alone.

    Args:
        key: of the setting.
        value: of the setting.
        joint: between name and value, unless the value begins with a digit.
    """
    name = key.rpartition(".")[2]
    text = re.sub(r"[^\w.+]+", "_", str(value)).strip("_")
    if name in ("architecture", "reads", "gives"):
        return text
    return f"{name}{text}" if text[:1].isdigit() else f"{name}{joint}{text}"


def _put(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        settings = settings[key]
    settings[keys[-1]] = value


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
