"""Opens a dictionary together with its language model, from a run folder or from any folder with a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae.config.file import CONFIG_YAML
from sae.config.progress import Progress, silent
from sae.dictionary.base import Dictionary
from sae.dictionary.saved import weights_sha256
from sae.features.layout import INDEX
from sae.features.store import Features, store_of
from sae.files.paths import expanded, resolve
from sae.files.writing import stands
from sae.model.language_model import LanguageModel
from sae.runs.opening import open_run


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
    place: str | Path, model: str | None = None, device: str | None = None, progress: Progress = silent, *,
    overrides: Sequence[str] = (),
) -> InModel:  # fmt: skip
    """A dictionary with its language model and its feature store.

    Args:
        place: a run folder, or what `sae.load` takes.
        model: name of the language model; None for that of the run, or for the one that the dictionary's files name.
        device: the device of both; None for that of the run, or for the fastest.
        overrides: KEY=VALUE settings of the run, such as `model.dtype=bfloat16`.
        progress: called with (stage, done, total) while the model is loaded.

    Raises:
        ConfigError: no model is named; the run's configuration cannot be read.
        SaeError: the dictionary or the model cannot be loaded.
    """
    is_run = stands(expanded(place) / CONFIG_YAML)
    settings = {"model.name": model if is_run else None, "device": device}
    given = [f"{key}={value}" for key, value in settings.items() if value is not None]
    run = open_run(place, [*overrides, *given], model=None if is_run else model, needs_texts=False, progress=progress)
    language_model = run.language_model
    dictionary = run.dictionary().to(language_model.device).requires_grad_(False)
    return InModel(dictionary, language_model, _store(expanded(place), dictionary))


def _store(folder: Path, dictionary: Dictionary) -> Features | None:
    """The feature store next to a dictionary, unless it was collected from another one."""
    found = resolve(folder, "features", INDEX)
    return None if found is None else store_of(found, weights_sha256(dictionary))
