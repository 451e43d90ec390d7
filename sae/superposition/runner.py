"""A folder of experiments: each is run once, stored when done, and skipped if it is stored already."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sae.config.progress import Progress, silent, within
from sae.errors import ConfigError, FormatError, SaeError, TrainingInterrupted
from sae.files import version
from sae.files.formats import Format, as_read_back, fingerprint_of
from sae.files.kept import KeptResult
from sae.files.paths import expanded
from sae.files.reading import validated
from sae.files.temporary import is_leftover
from sae.files.writing import locked, write_bytes
from sae.numerics.modes import in_own_modes
from sae.superposition import dictionaries, experiments
from sae.superposition.figures import draw
from sae.superposition.report import Finished, markdown

MARKDOWN_FILE = "superposition.md"
_KEPT = KeptResult(Format("sae-superposition", 1), "superposition.json", of_version=False, grows=True)


@dataclass(frozen=True)
class Experiment:
    """An experiment that can be run.

    Attributes:
        title: its heading in the report.
        settings: the default settings; their type defines the possible ones.
        run: function of settings, seed and progress.
        result: type of its result.
    """

    title: str
    settings: Any
    run: Callable[..., Any]
    result: type


EXPERIMENTS: dict[str, Experiment] = {
    "geometry": Experiment(
        "Features in the plane as density falls",
        experiments.GeometrySettings(),
        experiments.run_geometry,
        experiments.GeometryResult,
    ),
    "dimensionality": Experiment(
        "Feature dimensionality",
        experiments.DimensionalitySettings(),
        experiments.run_dimensionality,
        experiments.DimensionalityResult,
    ),
    "phases-2-1": Experiment(
        "Phases of two features in one dimension",
        experiments.PhaseSettings(2, 1),
        experiments.run_phases,
        experiments.PhaseResult,
    ),
    "phases-3-2": Experiment(
        "Phases of three features in two dimensions",
        experiments.PhaseSettings(3, 2),
        experiments.run_phases,
        experiments.PhaseResult,
    ),
    "recovery-toy": Experiment(
        "Dictionaries on a toy model's hidden activations",
        dictionaries.RecoverySettings("toy", features=64, d_in=16, mean_l0=1.0, d_sae=128, k=1),
        dictionaries.run_recovery,
        dictionaries.RecoveryResult,
    ),
    "recovery-even": Experiment(
        "Dictionaries on even features",
        dictionaries.RecoverySettings("even"),
        dictionaries.run_recovery,
        dictionaries.RecoveryResult,
    ),
    "recovery-hard": Experiment(
        "Dictionaries on uneven, correlated and hierarchical features",
        dictionaries.RecoverySettings("hard"),
        dictionaries.run_recovery,
        dictionaries.RecoveryResult,
    ),
}


@in_own_modes
def run(
    folder: str | Path,
    names: Iterable[str] = (),
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Finished]:
    """Run experiments; after each, write `superposition.json`, `superposition.md` and its figure.

    An experiment that is already in the folder, with the same settings, seed and version of this package, is not run
    again.

    Args:
        folder: created if missing; refused if it holds something else.
        names: keys of `EXPERIMENTS`; empty: all.
        seed: for everything random.
        settings: by experiment, in place of its default settings.
        progress: called with (experiment, inputs done, total).

    Raises:
        ConfigError: an experiment is unknown, or the folder holds something else or results of other settings.
        TrainingInterrupted: Ctrl-C; finished experiments are kept.
    """
    chosen = _chosen(names)
    folder = expanded(folder)
    _check_folder(folder)
    requested = {name: (settings or {}).get(name, EXPERIMENTS[name].settings) for name in chosen}
    with locked(folder, "'sae superposition'"):
        entries = _read(folder)
        for name in chosen:
            if name in entries:
                _check_same(folder, name, entries[name], requested[name], seed)
        _write(folder, entries)
        finished = {}
        for name in chosen:
            if name not in entries:
                entries[name] = _run(name, requested[name], seed, folder, progress)
                _write(folder, entries)
            finished[name] = _restore(folder, name, entries[name])
    return finished


def key_of(name: str, settings: Any, seed: int) -> str:
    """Hash of everything that determines an experiment's result: settings, seed, version of this package."""
    identity = {"name": name, "settings": dataclasses.asdict(settings), "seed": seed, "version": version.__version__}
    return fingerprint_of(identity)


def _chosen(names: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(names)) or list(EXPERIMENTS)
    for name in names:
        if name not in EXPERIMENTS:
            raise ConfigError(f"experiment {name!r}: expected one of {', '.join(EXPERIMENTS)}")
    return names


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={str(folder)!r} is a file: choose a folder with --out")
    if not folder.is_dir() or _KEPT.stands(folder):
        return
    others = sorted(path.name for path in folder.iterdir() if not is_leftover(path.name))
    if others:
        raise ConfigError(
            f"folder {str(folder)!r} holds {others[0]!r} and no {_KEPT.index}: it is not from 'sae superposition'; "
            "choose another with --out"
        )


def _read(folder: Path) -> dict[str, Any]:
    if not _KEPT.stands(folder):
        return {}
    content = _KEPT.read(folder, f"folder {str(folder)!r}", way_out="choose another with --out", oldest=1)
    experiments = validated(folder / _KEPT.index, dict[str, dict[str, Any]], content.get("experiments"))
    return {name: _with_new_names(name, entry) for name, entry in experiments.items() if name in EXPERIMENTS}


def _with_new_names(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with the present names of settings, and with the key that they have."""
    settings, result = entry.get("settings"), entry.get("result")
    if not (isinstance(settings, dict) and isinstance(result, dict) and dictionaries.RENAMED.keys() & settings.keys()):
        return entry
    settings, result = (
        {dictionaries.RENAMED.get(key, key): value for key, value in part.items()} for part in (settings, result)
    )
    identity = {"name": name, "settings": settings, "seed": entry.get("seed"), "version": entry.get("sae_version")}
    return {**entry, "settings": settings, "result": result, "key": fingerprint_of(identity)}


def _check_same(folder: Path, name: str, entry: Mapping[str, Any], settings: Any, seed: int) -> None:
    if entry.get("key") == key_of(name, settings, seed):
        return
    stored = {"sae version": entry.get("sae_version"), "seed": entry.get("seed"), **_flat(_settings_of(entry))}
    requested = {
        "sae version": version.__version__,
        "seed": seed,
        **_flat(as_read_back(dataclasses.asdict(settings))),
    }
    key = next((key for key, value in requested.items() if stored.get(key) != value), "settings")
    raise ConfigError(
        f"experiment {name!r} in {str(folder)!r}: made with {key}={stored.get(key)!r}, now {requested.get(key)!r}; "
        "choose another folder with --out"
    )


def _settings_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    settings = entry.get("settings")
    return settings if isinstance(settings, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _run(name: str, settings: Any, seed: int, folder: Path, progress: Progress) -> dict[str, Any]:
    experiment = EXPERIMENTS[name]
    started = time.perf_counter()
    try:
        result = experiment.run(settings, seed, within(progress, name))
    except TrainingInterrupted as stopped:
        raise TrainingInterrupted(
            f"experiment {name!r} was stopped; those before it are in {str(folder)!r}: run the same command again to "
            "continue"
        ) from stopped
    return {
        "key": key_of(name, settings, seed),
        "sae_version": version.__version__,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "seconds": round(time.perf_counter() - started, 1),
        "result": TypeAdapter(experiment.result).dump_python(result, mode="json"),
    }


def _restore(folder: Path, name: str, entry: Mapping[str, Any]) -> Finished:
    """An experiment from its entry; its figure is drawn if it is missing and matplotlib is installed."""
    experiment = EXPERIMENTS[name]
    try:
        result = TypeAdapter(experiment.result).validate_python(entry["result"])
        settings = TypeAdapter(type(experiment.settings)).validate_python(entry["settings"])
        seed, seconds = int(entry["seed"]), float(entry["seconds"])
    except (ValidationError, KeyError, TypeError, ValueError, SaeError) as error:
        raise FormatError(
            f"experiment {name!r} in {str(folder / _KEPT.index)!r} cannot be read; choose another folder with --out"
        ) from error
    path = folder / f"{name}.png"
    if not path.is_file() and (png := draw(result)) is not None:
        write_bytes(path, png)
    return Finished(name, experiment.title, settings, seed, seconds, result, path.name if path.is_file() else None)


def _write(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write all entries in the order of `EXPERIMENTS`; the JSON file is first, since it identifies the folder."""
    ordered = {name: entries[name] for name in EXPERIMENTS if name in entries}
    _KEPT.write(folder, {"experiments": ordered})
    text = markdown([_restore(folder, name, entry) for name, entry in ordered.items()])
    write_bytes(folder / MARKDOWN_FILE, text.encode())
