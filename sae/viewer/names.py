"""The names under which Neuronpedia and SAEDashboard list a store's features: model, layer, set, creator."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sae.dictionary.hook_points import block_of
from sae.errors import ConfigError
from sae.features.store import Features
from sae.files.printable import printable

_SET = re.compile(r"[a-z]|[a-z](?!.*--)[a-z0-9-]*[a-z0-9]")
_MODEL = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")
_RESERVED = "neurons"
"""Neuronpedia's set of the model's own neurons."""
_THEIR_NAMES = {"gpt2": "gpt2-small"}
"""Neuronpedia's ids of models that it does not call by the last part of their names on the hub."""


@dataclass(frozen=True)
class Names:
    """How a viewer lists the features of a dictionary.

    Attributes:
        model: id of the language model.
        layer: number of the block.
        set_name: name of the set of dictionaries, one per layer, that this one belongs to.
        creator: who made it.
        description: one line on it.
    """

    model: str
    layer: int
    set_name: str
    creator: str
    description: str

    @property
    def source(self) -> str:
        """Neuronpedia's id of the dictionary."""
        return f"{self.layer}-{self.set_name}"


def names_of(
    features: Features,
    set_name: str | None = None,
    model: str | None = None,
    creator: str | None = None,
    description: str | None = None,
) -> Names:
    """Check names, and find those that are not given.

    Args:
        features: the store; its folder, or the run folder that holds it, gives the set's name.
        set_name: lower-case letters, digits and single hyphens, beginning with a letter.
        model: lower-case letters, digits, `-`, `_` and `.`; None: from the model's own name.
        creator: None: unknown.
        description: None: hook point and number of features.

    Raises:
        ConfigError: a name has other characters, or the hook point belongs to no block.
    """
    hook = features.info["hook"]
    layer = block_of(hook)
    if layer is None:
        raise ConfigError(f"hook {printable(hook)!r}: it belongs to no block, and both viewers list features by block")
    if set_name is None:
        folder = features.path.absolute()
        set_name = _fitted(folder.parent.name if folder.name == "features" else folder.name) or "sae"
    elif not _SET.fullmatch(set_name) or set_name == _RESERVED:
        raise ConfigError(
            f"set {printable(set_name)!r}: Neuronpedia takes lower-case letters, digits and single hyphens, beginning "
            f"with a letter, and not {_RESERVED!r}; such as {_fitted(set_name) or 'res-sae'!r}"
        )
    if model is None:
        own = str(features.info.get("model") or "unknown").rstrip("/").rpartition("/")[2].lower()
        model = _THEIR_NAMES.get(own) or re.sub(r"[^a-z0-9_.-]+", "-", own).strip("-._")[:128] or "unknown"
    elif not _MODEL.fullmatch(model):
        raise ConfigError(
            f"model {printable(model)!r}: Neuronpedia's ids have lower-case letters, digits, '-', '_' and '.', such as "
            "'gpt2-small'"
        )
    description = description or f"{len(features):,} features of {hook}"
    return Names(model, layer, set_name, printable(creator or "unknown"), printable(description))


def _fitted(name: str) -> str:
    """The name with other characters replaced; empty if nothing is left."""
    fitted = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").lstrip("0123456789-")
    return f"{fitted}-sae" if fitted == _RESERVED else fitted
