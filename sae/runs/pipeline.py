"""Steps of a run as functions: the whole pipeline from text to features, the harvest, the collection of features."""

from __future__ import annotations

from pathlib import Path

from sae.activations.cache import ActivationCache
from sae.config.progress import Progress, announce, silent
from sae.config.settings import RunConfig
from sae.features import Features
from sae.runs.run import Run

CROSSCODERS = "a crosscoder has no evaluation and no features yet: the run ends with the dictionary"


def run(config: RunConfig, progress: Progress = silent, *, features: bool = True) -> Run:
    """Harvest, train, evaluate, collect features; existing results are reused.

    Args:
        config: the run's configuration.
        progress: called with (stage, tokens done, tokens in total).
        features: collect features at the end.

    Returns:
        The run; `dictionary()`, `evaluate()` and `features()` give its results.

    Raises:
        SaeError: settings that cannot work (before anything is read), or a step that fails.
        TrainingInterrupted: Ctrl-C while training; the state is saved, and the same call resumes.
    """
    pipeline_run = Run(config, progress)
    pipeline_run.say_hook()
    pipeline_run.check()
    pipeline_run.check_space()
    pipeline_run.harvest()
    pipeline_run.train()
    if pipeline_run.config.is_crosscoder:
        announce(progress, CROSSCODERS)
        return pipeline_run
    if not pipeline_run.is_evaluated():
        pipeline_run.evaluate()
    if features:
        pipeline_run.features()
    return pipeline_run


def harvest(config: RunConfig, progress: Progress = silent) -> ActivationCache:
    """Cache the activations that a configuration asks for. An existing cache is opened, an unfinished one continued.

    Args:
        config: its `model`, `data` and `harvest` sections and the cache folder are used.
        progress: called with (stage, tokens done, tokens in total).

    Raises:
        CacheError: the folder holds another cache, cannot be written or is full; activations overflow the number type.
        DataError: the text cannot be read, or is too short.
        ModelError: the model cannot be loaded, has no such hook point, or cannot read contexts of that length.
    """
    return Run(config, progress).harvest()


def collect_features(folder: str | Path, progress: Progress = silent, overrides: tuple[str, ...] = ()) -> Features:
    """The feature store of a run folder, collected if it is missing or stale.

    Args:
        folder: the run folder.
        progress: called with (stage, tokens done, tokens in total).
        overrides: settings of the run to replace, such as `device=cpu`.

    Raises:
        SaeError: the run folder is incomplete or damaged, or its model cannot be loaded.
    """
    return Run.open(folder, overrides, progress).features()
