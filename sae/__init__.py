"""Sparse autoencoders on language-model activations: cache, train, evaluate, look at features, reuse.

Everything is imported when it is first used, so that `import sae` is quick and needs no language-model library.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; the same as _HOME
    from sae import evaluation as evaluation
    from sae import probing as probing
    from sae import superposition as superposition
    from sae.activations import ActivationCache as ActivationCache
    from sae.activations.loader import ActivationLoader as ActivationLoader
    from sae.activations.metadata import dictionary_metadata as dictionary_metadata
    from sae.architectures import BatchTopK as BatchTopK
    from sae.architectures import Gated as Gated
    from sae.architectures import JumpReLU as JumpReLU
    from sae.architectures import Matryoshka as Matryoshka
    from sae.architectures import ReLU as ReLU
    from sae.architectures import TopK as TopK
    from sae.architectures import load as load
    from sae.config.file import load_config as load_config
    from sae.config.settings import DictionaryConfig as DictionaryConfig
    from sae.config.settings import EvaluationConfig as EvaluationConfig
    from sae.config.settings import RunConfig as RunConfig
    from sae.config.settings import TrainConfig as TrainConfig
    from sae.config.sources import ModelConfig as ModelConfig
    from sae.dictionary.base import Codes as Codes
    from sae.dictionary.base import Dictionary as Dictionary
    from sae.dictionary.base import SparseAutoencoder as SparseAutoencoder
    from sae.effects import Effects as Effects
    from sae.effects import EffectSettings as EffectSettings
    from sae.effects import measure_effects as measure_effects
    from sae.errors import SaeError as SaeError
    from sae.evaluation import compare as compare
    from sae.evaluation import evaluate as evaluate
    from sae.evaluation import evaluate_all as evaluate_all
    from sae.features import Features as Features
    from sae.files.version import __version__ as __version__
    from sae.model.language_model import LanguageModel as LanguageModel
    from sae.model.splicing import splice as splice
    from sae.probing import probe as probe
    from sae.runs.pipeline import collect_features as collect_features
    from sae.runs.pipeline import harvest as harvest
    from sae.runs.pipeline import run as run
    from sae.runs.probes import probe_run as probe_run
    from sae.runs.sweeping import sweep as sweep
    from sae.runs.verification import verify as verify
    from sae.training import IterableSource as IterableSource
    from sae.training import Recipe as Recipe
    from sae.training import train as train
    from sae.training import train_all as train_all

__all__ = [
    "ActivationCache",
    "ActivationLoader",
    "BatchTopK",
    "Codes",
    "Dictionary",
    "DictionaryConfig",
    "EffectSettings",
    "Effects",
    "EvaluationConfig",
    "Features",
    "Gated",
    "IterableSource",
    "JumpReLU",
    "LanguageModel",
    "Matryoshka",
    "ModelConfig",
    "ReLU",
    "Recipe",
    "RunConfig",
    "SaeError",
    "SparseAutoencoder",
    "TopK",
    "TrainConfig",
    "collect_features",
    "compare",
    "dictionary_metadata",
    "evaluate",
    "evaluate_all",
    "harvest",
    "load",
    "load_config",
    "measure_effects",
    "probe",
    "probe_run",
    "run",
    "splice",
    "sweep",
    "train",
    "train_all",
    "verify",
]

_HOME = {
    "__version__": "sae.files.version",
    "ActivationCache": "sae.activations",
    "ActivationLoader": "sae.activations.loader",
    "BatchTopK": "sae.architectures",
    "Codes": "sae.dictionary.base",
    "Dictionary": "sae.dictionary.base",
    "DictionaryConfig": "sae.config.settings",
    "EffectSettings": "sae.effects",
    "Effects": "sae.effects",
    "EvaluationConfig": "sae.config.settings",
    "Features": "sae.features",
    "Gated": "sae.architectures",
    "IterableSource": "sae.training",
    "JumpReLU": "sae.architectures",
    "LanguageModel": "sae.model.language_model",
    "Matryoshka": "sae.architectures",
    "ModelConfig": "sae.config.settings",
    "ReLU": "sae.architectures",
    "Recipe": "sae.training",
    "RunConfig": "sae.config.settings",
    "SaeError": "sae.errors",
    "SparseAutoencoder": "sae.dictionary.base",
    "TopK": "sae.architectures",
    "TrainConfig": "sae.config.settings",
    "collect_features": "sae.runs.pipeline",
    "compare": "sae.evaluation",
    "dictionary_metadata": "sae.activations.metadata",
    "evaluate": "sae.evaluation",
    "evaluate_all": "sae.evaluation",
    "harvest": "sae.runs.pipeline",
    "load": "sae.architectures",
    "load_config": "sae.config.file",
    "measure_effects": "sae.effects",
    "probe": "sae.probing",
    "probe_run": "sae.runs.probes",
    "run": "sae.runs.pipeline",
    "splice": "sae.model.splicing",
    "sweep": "sae.runs.sweeping",
    "train": "sae.training",
    "train_all": "sae.training",
    "verify": "sae.runs.verification",
}

if not TYPE_CHECKING:  # else every name would be known, and of no type

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        if not name.startswith("_") and importlib.util.find_spec(f"sae.{name}"):
            return importlib.import_module(f"sae.{name}")
        raise AttributeError(f"module 'sae' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "evaluation", "probing", "superposition"]
