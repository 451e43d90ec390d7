"""Features of a store as files of other viewers, in a folder that appears when it is complete."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.dictionary.saved import weights_sha256
from sae.errors import ConfigError, UnknownFeatureError
from sae.features.store import Features
from sae.files.folders import complete_folder
from sae.files.paths import expanded
from sae.files.printable import printable
from sae.viewer import neuronpedia, saedashboard
from sae.viewer.dashboard import Dashboard
from sae.viewer.names import names_of

VIEWERS = {"neuronpedia": neuronpedia, "saedashboard": saedashboard}
"""The viewers whose files are written, by name."""


@runtime_checkable
class Unembeds(Protocol):
    """A language model, as far as the export asks it: an `sae.LanguageModel`."""

    def is_residual(self, hook: str) -> bool: ...

    def unembedding(self) -> Float[Tensor, "d_model vocab"]: ...


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        title: name of the viewer.
        features: number of features.
        files: the files written.
        source: name under which the viewer lists them: model, layer and set.
        missing: what the viewer's files have a place for but the export could not fill, each with the reason.
    """

    title: str
    features: int
    files: tuple[Path, ...]
    source: str
    missing: tuple[str, ...]


def export_features(
    features: Features | str | Path,
    folder: str | Path,
    to: str,
    *,
    dictionary: Dictionary | None = None,
    language_model: Unembeds | None = None,
    indices: Iterable[int] | None = None,
    set_name: str | None = None,
    model: str | None = None,
    creator: str | None = None,
    description: str | None = None,
) -> Export:
    """Write features of a store as Neuronpedia's files for bulk import, or as SAEDashboard's JSON.

    Numbers have six significant digits. The folder appears when all files are written.

    Args:
        features: the store, or a path of it or of the run folder that holds it.
        folder: it must be new or empty.
        to: `neuronpedia` or `saedashboard`.
        dictionary: the store's dictionary, for the neurons that each feature writes to, and the origin of its text.
        language_model: its model, for the histogram of each feature's effect on the logits; needs the dictionary too.
        indices: the features; None: all.
        set_name: name of the set of dictionaries that this one belongs to; None: that of the run folder.
        model: the viewer's id of the language model; None: from the model's name.
        creator: who made the dictionary.
        description: one line on it.

    Raises:
        ConfigError: there is no such viewer, it does not take a name, the folder has files, or the dictionary is
            not the store's.
        FormatError: there is no store, or it cannot be read.
        UnknownFeatureError: an index is not in the store.
        CacheError: the folder cannot be written.
    """
    if to not in VIEWERS:
        raise ConfigError(f"viewer {printable(to)!r}: files are written for {', '.join(VIEWERS)}")
    store = features if isinstance(features, Features) else Features(features)
    target = expanded(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{str(folder)!r}: already there; give a new folder")
    names = names_of(store, set_name, model, creator, description)
    chosen = list(range(len(store))) if indices is None else list(dict.fromkeys(indices))
    for index in chosen:
        if not 0 <= index < len(store):
            raise UnknownFeatureError(f"feature {index}: the store has features 0 to {len(store) - 1}")
    if not chosen:
        raise ConfigError("no features to export: name some, or leave them out to export all")
    output_hook, dataset, model_facts = store.info["hook"], "", {}
    if dictionary is not None:
        if weights_sha256(dictionary) != store.info.get("dictionary_sha256"):
            raise ConfigError(
                f"features {str(store.path)!r}: not of this dictionary; give the one they were collected of"
            )
        output_hook = dictionary.origin.gives.hook or output_hook
        dataset, model_facts = _dataset(dictionary.origin.data), dictionary.origin.models.get("", {})
    dashboard = Dashboard(
        store, *_matrices(store, dictionary, language_model, output_hook),
        output_hook=output_hook, model_facts=model_facts, dataset=dataset,
    )  # fmt: skip
    viewer = VIEWERS[to]
    with complete_folder(target) as unfinished:
        missing = viewer.write(unfinished, dashboard, chosen, names)
        files = tuple(sorted(path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()))
    return Export(
        viewer.TITLE, len(chosen), tuple(target / file for file in files), f"{names.model}/{names.source}",
        (*dashboard.missing, *missing),
    )  # fmt: skip


def _matrices(
    store: Features, dictionary: Dictionary | None, language_model: Unembeds | None, output_hook: str
) -> tuple[Tensor | None, Tensor | None]:
    """Decoder and unembedding, as far as they are known and meet."""
    if dictionary is None:
        return None, None
    W_dec = dictionary.W_dec.detach().cpu()
    if language_model is None or not language_model.is_residual(output_hook):
        return W_dec, None
    return W_dec, language_model.unembedding().detach().cpu()[:, : len(store.vocabulary)]


def _dataset(data: Mapping[str, Any] | None) -> str:
    """The source of the text as a dictionary's metadata names it; several are joined."""
    source = (data or {}).get("source")
    names = source if isinstance(source, list | tuple) else [source]
    return printable(", ".join(name for name in names if isinstance(name, str)))
