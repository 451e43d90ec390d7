"""The dictionary architectures, and `load` for saved dictionaries."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch

from sae.architectures.batch_topk import BatchTopK
from sae.architectures.gated import Gated
from sae.architectures.jumprelu import JumpReLU
from sae.architectures.matching_pursuit import MatchingPursuit
from sae.architectures.matryoshka import Matryoshka
from sae.architectures.relu import ReLU
from sae.architectures.topk import TopK
from sae.config.settings import Architecture
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.dictionary.saved import SavedDictionary, read_outline, read_saved
from sae.errors import FormatError
from sae.numerics.modes import defaults


def _class_of(name: str) -> type[Dictionary]:
    """The class in the file of this name."""
    module = import_module(f"{__name__}.{name}")
    return next(value for value in vars(module).values() if getattr(value, "architecture", None) == name)


ARCHITECTURES: dict[str, type[Dictionary]] = {name: _class_of(name) for name in get_args(Architecture)}
"""The architectures that can be trained, by name."""
LOADED: dict[str, type[Dictionary]] = {**ARCHITECTURES, MatchingPursuit.architecture: MatchingPursuit}
"""All that can be loaded."""


@torch.inference_mode(False)
def load(path: str | Path, *, device: str | torch.device = "cpu") -> Dictionary:
    """Load a saved dictionary, from its folder or from the run folder that holds it.

    Returns:
        A dictionary in evaluation mode that takes raw activations `[..., d_in]`. Even inside `torch.inference_mode`,
        its weights are ordinary tensors, through which gradients can flow afterwards.

    Raises:
        FormatError: no dictionary there, another format, a newer version, a pickle, or weights that are damaged or of
            the wrong shape.
    """
    return _built(path, read_saved(path, device)).to(device)


def outline(path: str | Path) -> Dictionary:
    """As `load`, for settings, sizes and metadata: the dictionary is on the device `meta`, and no weights are read.

    Raises:
        FormatError: as `load`, as far as `config.json` and the names and shapes of the weights show it.
    """
    return _built(path, read_outline(path))


def _built(path: str | Path, saved: SavedDictionary) -> Dictionary:
    config: dict[str, Any] = saved.config
    architecture = LOADED.get(str(config.get("architecture", "")))
    if architecture is None:
        names = ", ".join(LOADED)
        raise FormatError(
            f"dictionary {str(path)!r}: architecture {config.get('architecture')!r} is not one of {names}"
        )
    try:
        settings = {key: config[key] for key in architecture.setting_names}
        with defaults():
            dictionary = architecture(config["d_in"], config["d_sae"], metadata=config.get("metadata"), **settings)
            dictionary.set_frame(Frame.from_json(config))
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise FormatError(f"dictionary {str(path)!r}: config.json is incomplete or wrong ({error})") from error
    try:
        dictionary.load_state_dict(saved.tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise FormatError(f"dictionary {str(path)!r}: weights do not fit config.json ({reason})") from error
    return dictionary.to(saved.tensors["W_dec"].dtype).eval().requires_grad_(False)


__all__ = [
    "ARCHITECTURES",
    "LOADED",
    "BatchTopK",
    "Dictionary",
    "Gated",
    "JumpReLU",
    "MatchingPursuit",
    "Matryoshka",
    "ReLU",
    "TopK",
    "load",
    "outline",
]
