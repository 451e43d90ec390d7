"""Opens a dictionary together with its language model, from a run folder or from any folder with a dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.config.file import CONFIG_YAML
from sae.config.progress import Progress, silent
from sae.config.sources import ModelConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.model_identity import model_label
from sae.dictionary.saved import weights_sha256
from sae.errors import ConfigError
from sae.features.layout import INDEX
from sae.features.store import Features
from sae.files.paths import expanded, resolve
from sae.files.writing import stands
from sae.formats import load
from sae.model.language_model import LanguageModel
from sae.runs.run import Run


@dataclass(frozen=True)
class InModel:
    """A dictionary with the language model that it belongs to.

    Attributes:
        dictionary: the dictionary, on the model's device.
        language_model: the model.
        store: the dictionary's feature store; None if there is none next to it.
    """

    dictionary: Dictionary
    language_model: LanguageModel
    store: Features | None


def open_in_model(
    place: str | Path, model: str | None = None, device: str | None = None, progress: Progress = silent
) -> InModel:
    """A dictionary with its language model and its feature store.

    Args:
        place: a run folder, or a folder or file with a dictionary in any format that `sae.load` reads.
        model: name of the language model; None for that of the run.
        device: the device of both; None for that of the run, or for the CPU.
        progress: called with (stage, done, total) while the model is loaded.

    Raises:
        ConfigError: there is no model's name; the run's configuration cannot be read.
        SaeError: the dictionary or the model cannot be loaded.
    """
    folder = expanded(place)
    if stands(folder / CONFIG_YAML):
        settings = {"model.name": model, "device": device}
        overrides = tuple(f"{key}={value}" for key, value in settings.items() if value is not None)
        run = Run.open(folder, overrides, progress)
        dictionary, language_model = run.dictionary(), run.language_model
    else:
        dictionary = load(place, device=device or "cpu")
        if model is None:
            raise ConfigError(f"{str(place)!r}: not a run folder, so give the language model{_recorded(dictionary)}")
        stage = f"load {model_label(model)}"
        progress(stage, 0, 1)
        language_model = LanguageModel(ModelConfig(name=model), device or "cpu")
        progress(stage, 1, 1)
    dictionary = dictionary.to(language_model.device).requires_grad_(False)
    return InModel(dictionary, language_model, _store(folder, dictionary))


def _recorded(dictionary: Dictionary) -> str:
    """How to give the model's name, with the one that the dictionary records."""
    facts: Any = next(iter(dictionary.origin.models.values()), {})
    name = facts.get("name")
    return f": --model {name}, as its metadata says" if isinstance(name, str) else ": --model NAME"


def _store(folder: Path, dictionary: Dictionary) -> Features | None:
    """The feature store next to a dictionary, unless it was collected from another one."""
    found = resolve(folder, "features", INDEX)
    if found is None:
        return None
    store = Features(found)
    return store if store.info.get("dictionary_sha256") == weights_sha256(dictionary) else None
