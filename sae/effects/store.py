"""Effects on disk: `effects.json`, every single change next to it, and the hash that identifies stale results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.dictionary.model_identity import NOT_OF_ACTIVATIONS
from sae.effects.effects import FORMAT, Effects, EffectSettings, kept_effects, stem
from sae.effects.figure import FIGURE_FOLDER, draw_effects
from sae.effects.interventions import NO_CHANGES, Changes
from sae.effects.view import markdown
from sae.errors import FormatError
from sae.features.store import Features
from sae.files import version
from sae.files.damage import way_out
from sae.files.formats import fingerprint_of
from sae.files.hashes import announce_missing
from sae.files.kept import NO_FILES
from sae.files.paths import expanded
from sae.files.reading import load_tensors, read_json, taken_apart
from sae.files.writing import delete, stands, tensors_content, write_bytes

_KEY = "key"
ABLATION = kept_effects(0.0)


def effects_key(
    dictionary: Mapping[str, Any], activations: str, hook: str, model: Mapping[str, Any], settings: EffectSettings
) -> str:
    """Hash of everything that determines effects: weights, data, hook point, model, settings and package version.

    Args:
        dictionary: its identity, with `weights_sha256`.
        activations: the cache's identity at the hook point, which covers model, text and token policy.
        hook: hook point.
        model: identity of the language model; its name and file fingerprint are left out, since they may differ for
            the same model.
        settings: all settings.
    """
    model = {key: value for key, value in model.items() if key not in NOT_OF_ACTIVATIONS}
    facts = [FORMAT.version, version.__version__, dict(dictionary), activations, hook, model, vars(settings)]
    return fingerprint_of(facts)


def write_effects(effects: Effects, changes: Changes, folder: Path) -> None:
    """Write everything: JSON and the changes, and Markdown with a figure for reading.

    Raises:
        CacheError: the folder cannot be written.
    """
    name, png = stem(effects.settings.scale), draw_effects(effects, changes)
    figures = {} if png is None else {f"{FIGURE_FOLDER}/{name}.png": png}
    save_effects(effects, changes, folder, figures)
    write_bytes(folder / f"{name}.md", markdown(effects, next(iter(figures), None)).encode())


def save_effects(
    effects: Effects, changes: Changes, folder: Path, figures: Mapping[str, bytes] = NO_FILES
) -> None:  # fmt: skip
    """Write what is needed to continue: the changes first, so that the JSON never lists a feature without its changes.

    An older Markdown file with fewer features is deleted; `write_effects` writes it again.

    Raises:
        CacheError: the folder cannot be written.
    """
    name = stem(effects.settings.scale)
    delete(folder / f"{name}.md")
    tensors = {column: torch.from_numpy(np.ascontiguousarray(values)) for column, values in changes.columns().items()}
    columns = {f"{name}.safetensors": tensors_content({**tensors, _KEY: _as_tensor(effects.key)})}
    kept_effects(effects.settings.scale).write(folder, effects.to_json(), {**figures, **columns})


def read_effects(path: str | Path) -> Effects:
    """Effects from their JSON file, or from the run folder with `effects.json`.

    Raises:
        FormatError: there are none, or they are damaged or have a newer version.
    """
    path = expanded(path)
    file = path if stands(path) and not path.is_dir() else path / ABLATION.index
    if not stands(file):
        raise FormatError(f"effects {str(path)!r}: no {file.name} there; make it with 'sae effects RUN'")
    return _from_json(file, read_json(file))


def _from_json(file: Path, record: Any) -> Effects:
    try:
        return Effects.from_json(record)
    except FormatError as error:
        raise FormatError(f"{str(file)!r}: {error}; {way_out(file)}") from error


def resume(folder: Path, key: str, scale: float) -> tuple[Effects, Changes] | None:
    """Effects saved under the same key and the changes they were computed from; None if there are none.

    Files of other weights, data or settings count as missing.

    Raises:
        FormatError: a file is damaged.
    """
    kept = kept_effects(scale)
    record = kept.find(folder, key=key)
    if record is None:
        return None
    columns = folder / kept.beside[0]
    effects, tensors = _from_json(folder / kept.index, record), load_tensors(columns)
    changes_key = tensors.pop(_KEY, None)
    if changes_key is None or changes_key.tolist() != _as_tensor(key).tolist():
        return None
    if tensors.keys() != NO_CHANGES.columns().keys():
        return None
    with taken_apart(columns):
        changes = Changes(**{column: values.numpy() for column, values in tensors.items()})
        return effects, changes.at(np.isin(changes.feature, list(effects.features)))


def effects_beside(features: Features) -> Effects | None:
    """The effects of ablation in a feature store's run folder; None if there are none for the store's dictionary.

    Raises:
        FormatError: they are damaged, or have a newer version.
    """
    folder = features.path.parent
    file = folder / ABLATION.index
    if not stands(file):
        announce_missing(file, "effects are left out until 'sae effects' measures them again")
        return None
    effects = read_effects(folder)
    same = effects.dictionary.get("weights_sha256") == features.info.get("dictionary_sha256")
    return effects if same and effects.hook == features.info["hook"] else None


def _as_tensor(key: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(key)), dtype=torch.uint8)
