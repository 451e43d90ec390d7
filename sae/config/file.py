"""YAML and command-line overrides in, one `RunConfig` out; what does not fit is explained."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError

from sae.config.check import check_fit
from sae.config.settings import RunConfig, is_text
from sae.errors import ConfigError, DamagedError, UnreadableError
from sae.files.hashes import PARTS, SUMS, read_checked, recorded
from sae.files.paths import expanded
from sae.files.printable import one_line
from sae.files.writing import stands

CONFIG_YAML = "config.yaml"
"""What a run folder records its settings in."""
MOST_YAML_BYTES = 1 << 20
TRUST_SETTING = "model.trust_remote_code"
_MOST_VALUES = 10_000
_LONGEST = 300


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply `key.subkey=value` overrides.

    Values are YAML too, except of settings that hold text: these are taken as they stand (`out=2024-11-23` is no date
    there), and `null` or nothing is None. Where text or a list of texts may stand, what begins with `[` is the list.

    Raises:
        ConfigError: the file is missing or not YAML, a key does not exist, or a value does not fit.
    """
    settings = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}: expected key=value, such as dictionary.k=64")
        _set(settings, key.strip().split("."), _parse_value(key.strip(), value.strip(), override))
    return parse_config(settings)


def named_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a file that somebody named; what lies in a run folder is a record there too.

    Raises:
        ConfigError: as `load_config`; or it is a run folder's, and lets code run that `overrides` do not let.
    """
    config = load_config(path, overrides)
    place = expanded(path).resolve()
    if place.name == CONFIG_YAML and any(stands(place.parent / name) for name in (SUMS, *PARTS)):
        check_permission(config, f"run {str(path.parent)!r}", overrides)
    return config


def check_permission(config: RunConfig, place: str, overrides: Sequence[str]) -> None:
    """Refuse to run code of a model on the word of a run folder alone.

    Raises:
        ConfigError: the configuration lets it run, and the command does not say so itself.
    """
    said = any(override.partition("=")[0].strip() in (TRUST_SETTING, "model") for override in overrides)
    if config.model.trust_remote_code and not said:
        raise ConfigError(
            f"{place}: its {CONFIG_YAML} has {TRUST_SETTING}=true, which is only a record there: code that comes with "
            f"model {config.model.name!r} would run; if you trust it, add {TRUST_SETTING}=true, else "
            f"{TRUST_SETTING}=false"
        )


def parse_config(settings: dict[str, Any]) -> RunConfig:
    """Validate nested settings.

    Raises:
        ConfigError: a key does not exist (the nearest one is named), a value does not fit, or two settings contradict.
    """
    try:
        config = RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors(include_url=False)[0])) from error
    except RecursionError as error:
        raise ConfigError("the settings are too deep") from error
    _check_together(config)
    return config


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """Every key with its default and its meaning, in the order of the file."""
    for key, field in _fields(RunConfig):
        default = yaml.safe_dump(_plain(field.default), default_flow_style=True).replace("\n...", "").strip()
        yield key, default, field.description or ""


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _check_together(config: RunConfig) -> None:
    check_fit(config.dictionary, config.train)
    repeated = sorted({hook for hook in config.harvest.hooks if config.harvest.hooks.count(hook) > 1})
    if repeated:
        raise ConfigError(f"harvest.hooks names {', '.join(repeated)} more than once: name each hook point once")
    if config.hook not in config.harvest.hooks:
        raise ConfigError(
            f"dictionary.hook={config.hook!r} is not harvested; harvest.hooks has {', '.join(config.harvest.hooks)}"
        )


class _EachKeyOnce(yaml.SafeLoader):
    """YAML of which no value is lost because its key stands a second time."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ComposerError(None, None, f"{key.value!r} is there a second time", key.start_mark)
            seen.add(key.value)
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Nodes count as often as aliases repeat them, so that ten lines cannot stand for a billion values."""
        node: Any = super().compose_node(parent, index)
        inner = node.value if isinstance(node.value, list) else []
        parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
        node.size = 1 + sum(part.size for part in parts)
        if node.size > _MOST_VALUES:
            raise ComposerError(None, None, f"more than {_MOST_VALUES:,} values, aliases counted", node.start_mark)
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"config {str(path)!r}: no such file")
    try:
        content = read_checked(path, most=MOST_YAML_BYTES, remedy=_remedy(path), announce=False)
        settings = parse_yaml(path, content)
    except (DamagedError, UnreadableError) as error:
        raise ConfigError(f"config {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"config {str(path)!r}: expected keys and values, such as 'seed: 0'")
    return settings


def _remedy(path: Path) -> str | None:
    """What to do if it cannot be read: no command makes anew what the user wrote."""
    own = path.name == CONFIG_YAML and bool(recorded(path))
    if path.is_dir() and not own:
        return f"name the YAML file, such as {str(path / CONFIG_YAML)!r}"
    return None if own else "give a YAML file that can be read"


def parse_yaml(path: Path, content: bytes) -> Any:
    """What a YAML file says.

    Raises:
        ConfigError: it is no YAML, a key stands twice, or it is too large or too deep.
    """
    try:
        return _parsed(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {str(path)!r}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config {str(path)!r}: not YAML ({one_line(str(error), _LONGEST)})") from error


def _parsed(text: str) -> Any:
    """YAML as values.

    Raises:
        yaml.YAMLError: it is none; or deeper, or a number longer, than settings are.
    """
    try:
        return yaml.load(text, _EachKeyOnce)
    except RecursionError as error:
        raise yaml.YAMLError("too deep") from error
    except (ValueError, TypeError, OverflowError, AttributeError, KeyError) as error:
        raise yaml.YAMLError(f"no value: {one_line(str(error), _LONGEST)}") from error


def _parse_value(key: str, value: str, override: str) -> Any:
    field = dict(_fields(RunConfig)).get(key)
    hint = ""
    if field is not None and is_text(field):
        if not (value.startswith("[") and field.annotation == str | tuple[str, ...]):
            is_null = not value or (value == "null" and field.annotation == str | None)
            return None if is_null else value
        hint = f"; what itself begins with '[' goes in quotes into a list: {key}=['[…']"
    try:
        return _parsed(value)
    except ComposerError as error:
        raise ConfigError(f"override {override!r}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {value!r} is not a YAML value{hint}") from error


def _set(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = settings.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {'.'.join(keys)}: {key} is a value, not a section")
        settings = inner
    settings[keys[-1]] = value


def _explain(error: ErrorDetails) -> str:
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    if error["type"] == "extra_forbidden":
        known = [name for name, _, _ in describe_keys()]
        section = ".".join(parts[:-1])
        siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
        anywhere = {name.rpartition(".")[2]: name for name in known}
        near = difflib.get_close_matches(parts[-1], siblings, 1) or difflib.get_close_matches(parts[-1], anywhere, 1)
        named = {**anywhere, **siblings}
        hint = f"did you mean {named[near[0]]}?" if near else "'sae train --help' lists every key"
        return f"unknown setting {key!r}: {hint}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "string_type" and error["input"] is not None:
        message += "; put it in quotes"
    return f"setting {key}={one_line(repr(error['input']), _LONGEST)}: {message}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
