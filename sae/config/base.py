"""The base class of all settings: frozen, typed, described, read from `key=value`, with errors that explain."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from yaml.composer import ComposerError

from sae.config.yaml_text import LONGEST, parsed
from sae.errors import ConfigError
from sae.files.printable import one_line

LARGEST = (1 << 63) - 1
"""Largest whole number in settings: a larger one could be written but not read back."""
_TEXTS = (str | tuple[str, ...], str | tuple[str, ...] | None)


class Renamed(NamedTuple):
    """A setting that has another name now, in the same section."""

    section: str
    old: str
    new: str


RENAMED = (Renamed("train", "products", "encoder_dtype"), Renamed("dictionary", "hook", "reads"))
"""Users are told the new name of a setting; files that the toolkit wrote are read with it."""
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


if TYPE_CHECKING:  # type checkers take the arguments of a class of settings from its fields
    from pydantic._internal._model_construction import ModelMetaclass as _Explaining
else:

    class _Explaining(type(BaseModel)):
        """The type of all classes of settings: wrong settings in Python give the same errors as in a file."""

        def __call__(cls, *args: Any, **settings: Any) -> Any:
            try:
                return super().__call__(*args, **settings)
            except ValidationError as error:
                raise ConfigError(_explained(cls, error, f"{cls.__name__}.model_fields")) from error


class Settings(BaseModel, metaclass=_Explaining):
    """A group of settings. Subclasses declare each setting as a pydantic `Field` with a default and a description.

    Raises:
        ConfigError: a key does not exist (the most similar one is suggested), or a value is invalid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    @field_validator("*", mode="after")
    @classmethod
    def _within_64_bits(cls, value: Any) -> Any:
        """Return the value if its whole numbers fit into 64 bits, as files of this toolkit require.

        Raises:
            PydanticCustomError: a number is too large.
        """
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -LARGEST - 1 <= number <= LARGEST:
                bound = f"at most {LARGEST:,}" if number > 0 else f"at least {-LARGEST - 1:,}"
                raise PydanticCustomError("whole_number", "Expected {bound}", {"bound": bound})
        return value

    @model_validator(mode="before")
    @classmethod
    def _as_expected(cls, settings: Any) -> Any:
        """Convert 1e8 to a number (YAML 1.1 reads it as text), and a single value to a list if a list is expected."""
        if not isinstance(settings, dict):
            return settings
        for section, old, new in RENAMED:
            if old in settings and new in cls.model_fields:
                raise ConfigError(f"setting '{section}.{old}' is called '{section}.{new}' now")
        return {
            key: value if (field := cls.model_fields.get(key)) is None else _expected(field, value)
            for key, value in settings.items()
        }


Kind = TypeVar("Kind", bound=Settings)


def _expected(field: FieldInfo, value: Any) -> Any:
    if not _is_text(field):
        value = _number(value)
    single = value is not None and not isinstance(value, list | tuple | set | dict)
    return (value,) if single and _holds_list(field) else value


def _number(value: Any) -> Any:
    """Convert text in scientific notation, also in lists, to numbers; return everything else unchanged."""
    if isinstance(value, list):
        return [_number(entry) for entry in value]
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _holds_list(field: FieldInfo) -> bool:
    """Whether a setting holds a list and nothing else; text is never split into letters."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    return str not in kinds and any(get_origin(kind) is tuple for kind in kinds)


def _is_text(field: FieldInfo) -> bool:
    """Whether a setting holds text, or text or a list of texts."""
    return field.annotation in (str, str | None, *_TEXTS)


def fields_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every setting of a group and its subgroups with its full key."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def described(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield every key with its default and description, in the order of declaration."""
    for key, field in fields_of(kind, prefix):
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        text = yaml.safe_dump(default, default_flow_style=True, width=1000).replace("\n...", "").strip()
        yield key, text, field.description or ""


def with_new_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename old keys in nested settings from a file that the toolkit wrote."""
    for section, old, new in RENAMED:
        inner = settings.get(section)
        if isinstance(inner, dict) and old in inner:
            renamed = {new if key == old else key: value for key, value in inner.items()}
            settings = {**settings, section: renamed}
    if isinstance(settings.get("sweep"), dict):
        settings = {**settings, "sweep": with_new_keys(settings["sweep"])}
    return settings


def read_words(kind: type[Settings], words: Iterable[str], settings: dict[str, Any], example: str) -> dict[str, Any]:
    """Apply words such as `train.lr=1e-3` to nested settings, and return these.

    Values are YAML, except for settings that hold text: their values are taken literally (`out=2024-11-23` is not a
    date), and `null` or nothing means None. In double quotes they may have escapes, such as a line end. If a setting
    takes text or a list of texts, a value that begins with `[` is a list.

    Raises:
        ConfigError: a word is not of the form `key=value` (the message shows `example`), its value is not valid YAML,
            or its key treats a value as a section.
    """
    fields = dict(fields_of(kind))
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals:
            raise ConfigError(f"override {word!r}: expected key=value, such as {example}")
        value = _value(key, text, fields.get(key))
        *sections, name = key.split(".")
        inner = settings
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"override {key}: {section} is a value, not a section")
        inner[name] = value
    return settings


def _value(key: str, text: str, field: FieldInfo | None) -> Any:
    hint = ""
    if field is not None and _is_text(field):
        quoted = len(text) > 1 and text[0] == text[-1] == '"'  # YAML reads escapes in it, such as a line end
        if not (text.startswith("[") and field.annotation in _TEXTS) and not quoted:
            return None if not text or (text == "null" and type(None) in get_args(field.annotation)) else text
        hint = f"; text that itself begins with '[' goes in quotes into a list: {key}=['[…']"
    if any(character in text for character in "*?["):
        hint = hint or f"; a pattern of hook points goes in quotes into a list: {key}=['*…']"
    try:
        return parsed(text)
    except ComposerError as error:
        raise ConfigError(f"override {f'{key}={text}'!r}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"override {f'{key}={text}'!r}: {text!r} is not a YAML value{hint}") from error


def validated(kind: type[Kind], settings: Mapping[str, Any], all_keys: str) -> Kind:
    """Validate nested settings.

    Args:
        kind: the class of the settings.
        settings: nested, by key.
        all_keys: where users find all keys, for the error message if no key is similar.

    Raises:
        ConfigError: a key does not exist (the most similar one is suggested), or a value is invalid.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_explained(kind, error, all_keys)) from error
    except RecursionError as error:
        raise ConfigError("the settings are too deep") from error


def _explained(kind: type[Settings], refusal: ValidationError, all_keys: str) -> str:
    error = refusal.errors(include_url=False)[0]
    parts = [str(part) for part in error["loc"]]
    key = ".".join(parts)
    if error["type"] == "extra_forbidden":
        section = ".".join(parts[:-1])
        anywhere = {name.rpartition(".")[2]: name for name, _ in fields_of(kind)}
        siblings = {name.rpartition(".")[2]: name for name, _ in fields_of(kind) if name.rpartition(".")[0] == section}
        near = difflib.get_close_matches(parts[-1], siblings, 1) or difflib.get_close_matches(parts[-1], anywhere, 1)
        hint = f"did you mean {(anywhere | siblings)[near[0]]}?" if near else f"{all_keys} lists every key"
        return f"unknown setting {key!r}: {hint}"
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "string_type" and error["input"] is not None:
        message += "; put it in quotes"
    return f"setting {key}={one_line(repr(error['input']), LONGEST)}: {message}"
