"""Sparse autoencoders on language-model activations: cache, train, evaluate, inspect features, reuse.

Names are imported when they are first used, so `import sae` is quick and needs no language-model library.
`__init__.pyi` declares the same names for editors and type checkers.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_HOME = {
    "__version__": "sae.files.version",
    "ActivationCache": "sae.activations",
    "ActivationLoader": "sae.activations.loader",
    "Attribution": "sae.effects",
    "BatchTopK": "sae.architectures",
    "Codes": "sae.dictionary.codes",
    "Dictionary": "sae.dictionary.base",
    "DictionaryConfig": "sae.config.settings",
    "EffectSettings": "sae.effects",
    "Effects": "sae.effects",
    "EvaluationConfig": "sae.config.settings",
    "Features": "sae.features",
    "Gated": "sae.architectures",
    "IterableSource": "sae.training",
    "JoinedSource": "sae.training",
    "JumpReLU": "sae.architectures",
    "LanguageModel": "sae.model.language_model",
    "LivePass": "sae.activations.live",
    "Matryoshka": "sae.architectures",
    "ModelConfig": "sae.config.sources",
    "NextToken": "sae.effects",
    "ReLU": "sae.architectures",
    "Recipe": "sae.training",
    "RunConfig": "sae.config.settings",
    "SaeError": "sae.errors",
    "SparseAutoencoder": "sae.dictionary.base",
    "Steering": "sae.model.steering",
    "TopK": "sae.architectures",
    "TrainConfig": "sae.config.settings",
    "attribute": "sae.effects",
    "collect_features": "sae.runs.pipeline",
    "compare": "sae.evaluation",
    "convert": "sae.formats",
    "dictionary_metadata": "sae.activations.metadata",
    "evaluate": "sae.evaluation",
    "evaluate_all": "sae.evaluation",
    "export_features": "sae.viewer",
    "find": "sae.runs.concepts",
    "harvest": "sae.runs.pipeline",
    "list_dictionaries": "sae.hub",
    "load": "sae.formats",
    "load_all": "sae.formats",
    "load_config": "sae.config.file",
    "measure_effects": "sae.effects",
    "measure_replacement": "sae.evaluation",
    "measure_steering": "sae.model.steering_effect",
    "open_run": "sae.runs.opening",
    "probe": "sae.probing",
    "probe_run": "sae.runs.probes",
    "pull": "sae.runs.publishing",
    "push": "sae.runs.publishing",
    "replace": "sae.runs.replacement",
    "run": "sae.runs.pipeline",
    "splice": "sae.model.splicing",
    "steer": "sae.model.steering",
    "sweep": "sae.runs.sweeping",
    "text_features": "sae.features.text_features",
    "train": "sae.training",
    "train_all": "sae.training",
    "verify": "sae.runs.verification",
}

__all__ = [name for name in _HOME if not name.startswith("_")]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"sae.{name}"):
        return importlib.import_module(f"sae.{name}")
    raise AttributeError(f"module 'sae' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "evaluation", "probing", "superposition"]
