"""A run folder as it is found: its configuration, and what its parts say of each other."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from sae.architectures import load
from sae.config.environment import git_commit
from sae.config.file import CONFIG_YAML, MOST_YAML_BYTES, check_permission, load_config
from sae.config.settings import RunConfig
from sae.config.yaml_text import parse_file
from sae.dictionary.base import CONFIG_FILE
from sae.dictionary.saved import weights_sha256
from sae.errors import ConfigError, FormatError, SaeError, TrainingInterrupted
from sae.evaluation.report import JSON_FILE as REPORT_FILE
from sae.features.layout import INDEX
from sae.files import version
from sae.files.damage import damaged
from sae.files.hashes import check, read_checked
from sae.files.paths import expanded
from sae.files.printable import printable
from sae.files.reading import as_object, read_object
from sae.files.writing import stands, write_bytes
from sae.training.recipe import chosen_settings, setting_of

DICTIONARY = "dictionary"
_OF_DICTIONARY = {
    Path(REPORT_FILE): ("dictionary", "weights_sha256", "sae eval"),
    Path("effects.json"): ("dictionary", "weights_sha256", "sae effects"),
    Path("features", INDEX): (None, "dictionary_sha256", "sae features"),
}
"""Results of a run's dictionary, where they name its weights, and what makes them anew."""


def open_config(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of an existing run folder, which may have been moved.

    Raises:
        ConfigError: it is no run folder; or its configuration lets code of the model run and `overrides` do not say so:
            who wrote the folder does not decide that.
        FormatError: the dictionary there was made with other settings.
    """
    path = expanded(folder)
    if not stands(path / CONFIG_YAML):
        raise ConfigError(f"run {str(folder)!r}: no {CONFIG_YAML} there; make a run with 'sae run CONFIG out={folder}'")
    check(path / CONFIG_YAML)
    if (path / CONFIG_YAML).stat().st_size == 0:
        raise ConfigError(f"run {str(folder)!r}: {CONFIG_YAML} is empty; run the same 'sae run' again to write it anew")
    config = load_config(path / CONFIG_YAML, overrides)
    check_permission(config, f"run {str(folder)!r}", overrides)
    if contradiction := _other_settings(path, config):
        raise FormatError(contradiction)
    return config.model_copy(update={"out": str(path)})


def other_setting(
    config: RunConfig, metadata: Mapping[str, Any], of_data: Mapping[str, Any] | None = None
) -> tuple[str, Any, Any] | None:
    """The first setting that a dictionary was made with and the configuration has otherwise.

    Args:
        config: what is asked for.
        metadata: the dictionary's.
        of_data: further entries that its training recorded, as they should be.

    Returns:
        The setting's name, what the dictionary has and what is asked for; None if all are equal.
    """
    held = {**metadata.get("trained", {}).get("settings", {}), "hook": metadata.get("hook")}
    chosen = chosen_settings(config.dictionary, config.train)
    asked = {"hook": config.hook, **chosen, "seed": config.seed, **(of_data or {})}
    found = ((key, setting_of(held, key), value) for key, value in asked.items())
    return next(((key, there, value) for key, there, value in found if there != value), None)


def check_run(folder: Path) -> None:
    """Read a run folder's configuration, and compare with the dictionary what else is there.

    Raises:
        ConfigError: the configuration cannot be used.
        FormatError: a part is whole and belongs to another run.
        SaeError: one cannot be read.
    """
    config = load_config(folder / CONFIG_YAML)
    if not stands(folder / DICTIONARY / CONFIG_FILE):
        return
    if contradiction := _other_settings(folder, config):
        raise FormatError(contradiction)
    results = {folder / name: of for name, of in _OF_DICTIONARY.items() if stands(folder / name)}
    if not results:
        return
    weights = weights_sha256(load(folder))
    for path, (part, key, verb) in results.items():
        record = read_object(path)
        subject = as_object(path, record.get(part, {})) if part else record
        if subject.get(key, weights) != weights:
            raise damaged(path, f"of another dictionary than the one in {DICTIONARY}", f"run '{verb}' again")


def _other_settings(folder: Path, config: RunConfig) -> str | None:
    path = folder / DICTIONARY / CONFIG_FILE
    if not stands(path):
        return None
    metadata = as_object(path, read_object(path).get("metadata", {}))
    if not isinstance(metadata.get("trained"), dict) or not isinstance(metadata["trained"].get("settings"), dict):
        return None  # not from here
    found = other_setting(config, metadata)
    if found is None:
        return None
    key, held, asked = found
    return (
        f"run {str(folder)!r}: its dictionary was made with {key}={held!r}, and its {CONFIG_YAML} has {asked!r}: they "
        "are of two runs; put back the one that belongs there, or give the dictionary's own folder to sae.load"
    )


@contextlib.contextmanager
def configured(config: RunConfig) -> Iterator[None]:
    """Write `config.yaml` before a step; a step that is refused leaves the one that was there."""
    path = config.folder / CONFIG_YAML
    before = read_checked(path, most=MOST_YAML_BYTES) if stands(path) else None
    if before is None or parse_file(path, before) != config.model_dump(mode="json"):
        _write_config(path, config)
    try:
        yield
    except TrainingInterrupted:
        raise
    except SaeError:
        if before is not None:
            write_bytes(path, before)
        raise


def _write_config(path: Path, config: RunConfig) -> None:
    """The resolved configuration, loadable again, under a line that says what made it."""
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if printable(settings, lines=True) != settings:
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)  # escapes
    commit = git_commit()
    made_by = f"sae {version.__version__}{f' ({commit})' if commit else ''}, torch {torch.__version__}"
    write_bytes(path, f"# {made_by}, Python {platform.python_version()}\n{settings}".encode())
