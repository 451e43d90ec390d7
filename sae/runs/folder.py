"""An existing run folder: its configuration, and whether its parts belong together."""

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
from sae.config.file import CONFIG_YAML, MOST_YAML_BYTES, TRUST_SETTING, check_permission, load_config
from sae.config.settings import RunConfig
from sae.config.yaml_text import parse_file
from sae.dictionary.base import CONFIG_FILE
from sae.dictionary.origin import Origin
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
from sae.formats import circuit_tracer
from sae.training.recipe import chosen_settings, is_same_setting, setting_of

DICTIONARY = "dictionary"
_RESULTS = {
    Path(REPORT_FILE): ("dictionary", "weights_sha256", "sae eval"),
    Path("effects.json"): ("dictionary", "weights_sha256", "sae effects"),
    Path("features", INDEX): (None, "dictionary_sha256", "sae features"),
}
"""Results of a run's dictionary: the section and key with the hash of its weights, and the command that makes them."""


def open_config(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of an existing run folder, which may have been moved.

    Raises:
        ConfigError: it is not a run folder; or its configuration allows code of the model to run and `overrides` do
            not: the author of the folder does not decide that.
        FormatError: the dictionary in it was made with other settings.
    """
    path = expanded(folder)
    if not stands(path / CONFIG_YAML):
        raise ConfigError(
            f"run {str(folder)!r}: no {CONFIG_YAML} there; make a run with 'sae run CONFIG out={folder}', or for a "
            "dictionary of any toolkit give its language model and texts with --model and --data"
        )
    if layers := circuit_tracer.layers_in(path):
        raise ConfigError(
            f"{str(folder)!r}: not a run, but a set of {len(layers)} transcoders of {circuit_tracer.TITLE}; give one, "
            f"such as {str(Path(folder) / layers[0])!r}, with --model and --data"
        )
    check(path / CONFIG_YAML)
    if (path / CONFIG_YAML).stat().st_size == 0:
        raise ConfigError(f"run {str(folder)!r}: {CONFIG_YAML} is empty; run the same 'sae run' again to rewrite it")
    config = load_config(path / CONFIG_YAML, overrides)
    check_permission(config, f"run {str(folder)!r}", overrides)
    if contradiction := _other_settings(path, config):
        raise FormatError(contradiction)
    return config.model_copy(update={"out": str(path)})


def other_setting(
    config: RunConfig, metadata: Mapping[str, Any], of_data: Mapping[str, Any] | None = None
) -> tuple[str, Any, Any] | None:
    """The first setting in which a dictionary differs from a configuration.

    Args:
        config: the configuration.
        metadata: the dictionary's metadata.
        of_data: expected values of further entries that its training recorded.

    Returns:
        The setting's name, the dictionary's value and the configuration's; None if all are equal.
    """
    origin, trained = Origin.of(metadata), metadata.get("trained", {})
    if "settings" not in trained:
        converted = metadata.get("converted")
        return "trained_by", converted.get("format") if isinstance(converted, Mapping) else None, "sae"
    sites = {"reads": _entry(origin.reads.hooks), "gives": _entry(origin.gives.hooks)}
    recorded = {**trained["settings"], **sites}
    chosen = chosen_settings(config.dictionary, config.train)
    gives = config.reads if config.is_crosscoder else (config.gives,)
    own_sites = {"reads": _entry(config.reads), "gives": _entry(gives)}
    expected = {**own_sites, **chosen, "seed": config.seed, **(of_data or {})}
    different = (item for item in expected.items() if not is_same_setting(recorded, *item))
    return next(((key, setting_of(recorded, key), value) for key, value in different), None)


def _entry(hooks: Sequence[str | None]) -> str | list[str | None] | None:
    """Hook points as a setting has them: a single one, or a list."""
    return hooks[0] if len(hooks) == 1 else list(hooks)


def check_run(folder: Path) -> None:
    """Read a run folder's configuration, and check that the other parts belong to its dictionary.

    Raises:
        ConfigError: the configuration cannot be used.
        FormatError: a part is intact but belongs to another run.
        SaeError: a part cannot be read.
    """
    config = load_config(folder / CONFIG_YAML, [f"{TRUST_SETTING}=false"])
    if not stands(folder / DICTIONARY / CONFIG_FILE):
        return
    if contradiction := _other_settings(folder, config):
        raise FormatError(contradiction)
    results = {folder / name: keys for name, keys in _RESULTS.items() if stands(folder / name)}
    if not results:
        return
    weights = weights_sha256(load(folder))
    for path, (part, key, verb) in results.items():
        record = read_object(path)
        subject = as_object(path, record.get(part, {})) if part else record
        if subject.get(key, weights) != weights:
            raise damaged(path, f"of a dictionary other than the one in {DICTIONARY}", f"run '{verb}' again")


def _other_settings(folder: Path, config: RunConfig) -> str | None:
    path = folder / DICTIONARY / CONFIG_FILE
    if not stands(path):
        return None
    metadata = as_object(path, read_object(path).get("metadata", {}))
    if not isinstance(metadata.get("trained"), dict) or not isinstance(metadata["trained"].get("settings"), dict):
        return None  # not made by this package
    difference = other_setting(config, metadata)
    if difference is None:
        return None
    key, recorded, configured_value = difference
    return (
        f"run {str(folder)!r}: its dictionary was made with {key}={recorded!r}, and its {CONFIG_YAML} has "
        f"{configured_value!r}: they are from different runs; put back the one that belongs there, or give the "
        "dictionary's own folder to sae.load"
    )


@contextlib.contextmanager
def configured(config: RunConfig) -> Iterator[None]:
    """Write `config.yaml` before a step. If the step is refused, the previous file is restored."""
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
    """Write the resolved configuration, after a line with the versions that made it."""
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    if printable(settings, lines=True) != settings:
        settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)  # with escapes
    commit = git_commit()
    made_by = f"sae {version.__version__}{f' ({commit})' if commit else ''}, torch {torch.__version__}"
    write_bytes(path, f"# {made_by}, Python {platform.python_version()}\n{settings}".encode())
