"""Sparse autoencoders on language-model activations: cache, train, evaluate, look at features, reuse.

Heavy parts (transformer-lens, datasets, matplotlib) are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ActivationCache": "sae.activations",
    "ActivationLoader": "sae.activations.loader",
    "BatchTopK": "sae.architectures",
    "Codes": "sae.dictionary",
    "Dictionary": "sae.dictionary",
    "DictionaryConfig": "sae.config",
    "EffectSettings": "sae.causal",
    "Effects": "sae.causal",
    "EvaluationConfig": "sae.config",
    "Features": "sae.features",
    "Gated": "sae.architectures",
    "IterableSource": "sae.training",
    "JumpReLU": "sae.architectures",
    "LanguageModel": "sae.language_model",
    "Matryoshka": "sae.architectures",
    "ModelConfig": "sae.config",
    "ReLU": "sae.architectures",
    "Recipe": "sae.training",
    "RunConfig": "sae.config",
    "SaeError": "sae.errors",
    "TopK": "sae.architectures",
    "TrainConfig": "sae.config",
    "collect_features": "sae.pipeline",
    "compare": "sae.evaluation",
    "dictionary_metadata": "sae.activations.metadata",
    "evaluate": "sae.evaluation",
    "evaluate_all": "sae.evaluation",
    "harvest": "sae.pipeline",
    "load": "sae.architectures",
    "load_config": "sae.config_file",
    "measure_effects": "sae.causal",
    "probe": "sae.probing",
    "probe_run": "sae.probing.of_run",
    "run": "sae.pipeline",
    "splice": "sae.splicing",
    "sweep": "sae.sweep",
    "train": "sae.training",
    "train_all": "sae.training",
    "verify": "sae.verification",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sae' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
