"""YAML and command-line overrides in, one `RunConfig` out, with errors that explain."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae.config.base import described, read_words, validated, with_new_keys
from sae.config.check import check_fit
from sae.config.settings import RunConfig, is_pattern
from sae.config.yaml_text import parse_file
from sae.errors import ConfigError, DamagedError, UnreadableError
from sae.files.damage import PARTS, WAYS_OUT
from sae.files.hashes import read_checked
from sae.files.paths import expanded
from sae.files.sums import recorded
from sae.files.writing import stands

CONFIG_YAML = "config.yaml"
"""File in which a run folder records its settings."""
MOST_YAML_BYTES = 1 << 20
READ_BY_RUN = ("model.", "harvest.cache", "device")
"""Settings of an existing run that commands can override, by the beginnings of their keys."""
TRUST_SETTING = "model.trust_remote_code"
_SUFFIX = ".yaml"


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply overrides.

    Args:
        path: the file, or the name of a shipped configuration, such as `quickstart`; None: only defaults and overrides.
            A file in the current folder comes first. Relative paths in settings start from the current folder.
        overrides: such as `train.lr=1e-3`. Values are YAML, except for settings that hold text, whose values are taken
            literally.

    Raises:
        ConfigError: the file is missing or not YAML, a key does not exist, or a value is invalid; or it is the record
            of a run folder, which permits code of the model to run, and `overrides` do not: the author of the folder
            does not decide that.
    """
    file = None if path is None else find_config(path)
    settings = {} if file is None else _read_yaml(file)
    read_words(RunConfig, overrides, settings, "dictionary.k=64")
    config = parse_config(settings)
    if file is not None and _is_record(file):
        check_permission(config, f"run {str(expanded(file).resolve().parent)!r}", overrides)
    return config


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: of an installed package, or of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    folder = installed if installed.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob(f"*{_SUFFIX}"))}


def find_config(name: str | Path) -> Path:
    """The file of a configuration.

    Args:
        name: a path, or the name of a file in the current folder or of a shipped configuration, with or without
            `.yaml`. Files of the user come first.

    Raises:
        ConfigError: there is no such file; the most similar name of a shipped configuration is suggested.
    """
    path, shipped = Path(name), shipped_configs()
    stem = path.name.removesuffix(_SUFFIX)
    is_shipped_name = len(path.parts) == 1 and stem in shipped
    if path.exists() and not (path.is_dir() and is_shipped_name):  # a run's folder may have the name too
        return path
    if len(path.parts) > 1:
        hint = f"; {stem!r} is the configuration that comes with sae" if stem in shipped else ""
        raise ConfigError(f"config {str(path)!r}: no such file{hint}")
    if Path(f"{stem}{_SUFFIX}").exists():
        return Path(f"{stem}{_SUFFIX}")
    if stem in shipped:
        return shipped[stem]
    near = difflib.get_close_matches(stem, shipped, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"config {str(path)!r}: no such file; {hint}sae comes with {', '.join(shipped)}")


def check_permission(config: RunConfig, place: str, overrides: Sequence[str]) -> None:
    """Refuse to run a model's code if only a run folder permits it.

    Raises:
        ConfigError: the configuration permits the code, and the overrides do not mention it.
    """
    explicit = any(override.partition("=")[0].strip() in (TRUST_SETTING, "model") for override in overrides)
    if config.model.trust_remote_code and not explicit:
        raise ConfigError(
            f"{place}: its {CONFIG_YAML} has {TRUST_SETTING}=true, which is only a record there: code that comes with "
            f"model {config.model.name!r} would run; if you trust it, add {TRUST_SETTING}=true, else "
            f"{TRUST_SETTING}=false"
        )


def parse_config(settings: dict[str, Any]) -> RunConfig:
    """Validate nested settings.

    Raises:
        ConfigError: a key does not exist (the most similar one is suggested), a value is invalid, or two settings
            contradict each other.
    """
    config = validated(RunConfig, settings, "'sae train --help'")
    _check_together(config)
    return config


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Yield every key of a run's settings with its default and description, in order."""
    return described(RunConfig)


def _check_together(config: RunConfig) -> None:
    check_fit(config.dictionary, config.train)
    repeated = sorted({hook for hook in config.harvest.hooks if config.harvest.hooks.count(hook) > 1})
    if repeated:
        raise ConfigError(f"harvest.hooks names {', '.join(repeated)} more than once: name each hook point once")
    gives = config.dictionary.gives
    if config.is_crosscoder and gives not in (None, config.reads):
        raise ConfigError("dictionary.gives: a crosscoder gives the hook points that it reads; take it out")
    if isinstance(gives, tuple) and not config.is_crosscoder:
        raise ConfigError(
            f"dictionary.gives names {len(gives)} hook points, {', '.join(gives)}: a dictionary that reads one and "
            "gives several (a cross-layer transcoder) cannot be trained by this version; sweep.dictionary.gives trains "
            "one for each"
        )
    if len(set(config.reads)) < len(config.reads):
        raise ConfigError("dictionary.reads names a hook point more than once: name each once")
    sides = [("reads", hook) for hook in config.reads] + [("gives", gives)] * isinstance(gives, str)
    for key, hook in sides:
        if hook not in config.harvest.hooks and not any(map(is_pattern, (hook, *config.harvest.hooks))):
            raise ConfigError(
                f"dictionary.{key}={hook!r} is not harvested; harvest.hooks has {', '.join(config.harvest.hooks)}"
            )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_checked(path, most=MOST_YAML_BYTES, remedy=_remedy(path), announce=False)
        settings = parse_file(path, content)
    except (DamagedError, UnreadableError) as error:
        raise ConfigError(f"config {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"config {str(path)!r}: expected keys and values, such as 'seed: 0'")
    return with_new_keys(settings) if _is_record(path) else settings


def _is_record(path: Path) -> bool:
    """Whether the file is a run folder's record of its configuration."""
    place = expanded(path).resolve()
    others = (*PARTS, *(name for name in WAYS_OUT if name != CONFIG_YAML))
    return place.name == CONFIG_YAML and any(stands(place.parent / name) for name in others)


def _remedy(path: Path) -> str | None:
    """What to do if the file cannot be read: no command can recreate a file that the user wrote."""
    own = path.name == CONFIG_YAML and bool(recorded(path))
    if path.is_dir() and not own:
        return f"name the YAML file, such as {str(path / CONFIG_YAML)!r}"
    return None if own else "give a YAML file that can be read"
