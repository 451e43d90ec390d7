"""The five steps as functions of one configuration, and all of them in order: each skips what is already done."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sae.activations.cache import ActivationCache
from sae.activations.harvest import harvest as harvest_activations
from sae.activations.harvest import hook_widths
from sae.activations.loader import ActivationLoader
from sae.activations.manifest import MANIFEST, read_manifest
from sae.activations.metadata import dictionary_metadata
from sae.activations.same_model import check_same_model
from sae.activations.same_request import check_same_request
from sae.architectures import load
from sae.config.check import amount_notes, check_amounts
from sae.config.environment import choose_device, memory_of
from sae.config.progress import Notes, Progress, announce, silent, under, within
from sae.config.settings import RunConfig
from sae.dictionary.base import CONFIG_FILE, Dictionary
from sae.dictionary.model_identity import model_label
from sae.dictionary.saved import identify, weights_sha256
from sae.errors import ConfigError, FormatError
from sae.evaluation import Report, evaluate_all, partial, write_report
from sae.evaluation.budget import announcement
from sae.evaluation.stored import read_stored
from sae.features import Features, collect
from sae.features.layout import INDEX
from sae.features.store import is_store_of
from sae.files.hashes import check
from sae.files.writing import locked, stands
from sae.model.language_model import LanguageModel
from sae.runs.disk import check_disk
from sae.runs.folder import DICTIONARY, configured, open_config, other_setting
from sae.training.check import check_recipe
from sae.training.checkpoint import CHECKPOINTS, list_checkpoints, warn_of_missed_snapshots
from sae.training.loop import train_one
from sae.training.meter import falling
from sae.training.recipe import Recipe
from sae.training.sinks import METRICS_FILE, Wandb, check_wandb


class Run:
    """A run folder and its configuration; the language model is loaded when a step needs it, once.

    Args:
        config: the configuration.
        progress: called with (stage, tokens done, tokens in all).
    """

    def __init__(self, config: RunConfig, progress: Progress = silent) -> None:
        self.config, self.progress = config, progress
        self.folder = config.folder

    @staticmethod
    def open(folder: str | Path, overrides: tuple[str, ...] = (), progress: Progress = silent) -> Run:
        """The run of an existing folder, by its `config.yaml`; the folder may have been moved.

        Raises:
            ConfigError: the folder is not a run folder, or its configuration lets code of the model run and
                `overrides` do not say so: who wrote the folder does not decide that.
            FormatError: the dictionary there was made with other settings.
        """
        return Run(open_config(folder, overrides), progress)

    @cached_property
    def device(self) -> torch.device:
        """Where the run computes."""
        return choose_device(self.config.device)

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model of `config.model`."""
        stage = f"load {model_label(self.config.model.name)}"
        self.progress(stage, 0, 1)
        loaded = LanguageModel(self.config.model, self.device)
        self.progress(stage, 1, 1)
        return loaded

    @cached_property
    def start(self) -> Dictionary | None:
        """What training begins with, of `train.start_from`.

        Raises:
            FormatError: there is none; its weights are needed to resume as well, to see that they are the same.
        """
        place = self.config.train.start_from
        if place is None:
            return None
        try:
            return load(place)
        except FormatError as error:
            raise FormatError(
                f"train.start_from: {error} (training that has begun goes on with the same weights)"
            ) from error

    def harvest(self) -> ActivationCache:
        """The activation cache, harvested as far as it is missing."""
        folder = self.config.cache_folder
        if stands(folder / MANIFEST):
            manifest = read_manifest(folder)
            check_same_request(folder, manifest, self.config, text=True)
            if manifest.complete and all(manifest.is_whole(folder, name) for name in manifest.files):
                return ActivationCache(folder)
        with configured(self.config):
            language_model = self.language_model
            self.progress("read text", 0, 1)  # until the harvest reports for the first time
            return harvest_activations(self.config, language_model, within(self.progress, "harvest"))

    def cache(self, *, text: bool = False) -> ActivationCache:
        """The activation cache, which must be there; with `text`, and be of the text as it is now.

        Raises:
            CacheError: it is missing, unfinished, or made with other settings.
        """
        cache = ActivationCache(self.config.cache_folder)
        check_same_request(cache.path, cache.manifest, self.config, text=text)
        return cache

    def check(self) -> None:
        """Say before hours of harvesting what cannot be trained or evaluated.

        Raises:
            ConfigError: the settings name several dictionaries, one has no effect, amounts of tokens cannot work (see
                `sae.config.check.check_amounts`), parameters to freeze are not there, or the dictionary to start
                from has another d_sae (its d_in is compared when there are activations).
            FormatError: there is no dictionary at `train.start_from`.
        """
        if self.config.sweep:
            raise ConfigError("sweep names several dictionaries: train them with 'sae sweep', or take sweep out")
        check_amounts(self.config)
        if self.is_trained():
            return
        check_wandb(self.config.wandb)
        start = self.start
        recipe = Recipe(self.config.dictionary, self.config.train, start=start)
        check_recipe(recipe, 1 if start is None else start.d_in, memory_of(self.device))

    def check_space(self) -> None:
        """Say before the harvest that what the whole run writes does not fit.

        Raises:
            CacheError: fewer bytes are free than activations, checkpoints and dictionary need.
        """
        config, folder = self.config, self.config.cache_folder
        if stands(folder / MANIFEST) and read_manifest(folder).complete:
            return  # what is to be restored is checked by the harvest, and the rest when training begins
        check_disk(config, hook_widths(config, self.language_model), is_trained=self.is_trained())

    def train(self) -> Dictionary:
        """The dictionary, trained (or trained to the end) where it is not there yet."""
        self.check()
        cache = self.cache(text=True)
        if self.is_trained():
            return self.trained_already(cache)
        announce(self.progress, *amount_notes(self.config))
        with locked(self.folder, "training"):
            if self.is_trained():  # by another process, since
                return self.trained_already(cache)
            with configured(self.config):
                dictionary = self._train(cache)
                dictionary.save(self.folder / DICTIONARY)
        return dictionary

    def is_trained(self) -> bool:
        """Whether the dictionary is there, whatever its settings were."""
        return stands(self.folder / DICTIONARY / CONFIG_FILE)

    def evaluate(self) -> Report:
        """The report on the run's dictionary, also written as `eval.json` and `eval.md`."""
        return evaluate_runs([self])[0]

    def is_evaluated(self) -> bool:
        """Whether a whole evaluation is there, of this dictionary, cache, hook point, settings and package version."""
        asked = identify(self.dictionary("cpu")), self.cache().manifest.identity(self.config.hook)
        return read_stored(self.folder, *asked, hook=self.config.hook, settings=self.config.evaluation) is not None

    def features(self) -> Features:
        """The feature store; collected anew if it is missing, or of another dictionary, cache or setting.

        A store of this dictionary is enough where the activations have been deleted.

        Raises:
            DamagedError: a file of the store is damaged.
            CacheError: another process collects features there.
        """
        folder = self.folder / "features"
        if self._is_collected(folder):
            return Features(folder)
        with locked(folder, "collection of features"):
            return Features(folder) if self._is_collected(folder) else self._collect(folder)

    def _collect(self, folder: Path) -> Features:
        cache = self.cache()
        check_same_model(cache, self.language_model, self.config.hook)
        return collect(
            self.dictionary(),
            cache,
            folder,
            self.config.features,
            hook=self.config.hook,
            language_model=self.language_model,
            tokenizer=self.language_model.tokenizer,
            seed=self.config.seed,
            device=self.device,
            progress=within(self.progress, "features"),
        )

    def dictionary(self, device: str | torch.device | None = None) -> Dictionary:
        """The trained dictionary, on the run's device or another."""
        return load(self.folder, device=device or self.device)

    def loader(self, cache: ActivationCache) -> ActivationLoader:
        """The batches that the run's dictionary is trained on."""
        settings = self.config.train
        return ActivationLoader(
            cache,
            self.config.hook,
            batch_size=settings.batch_size,
            seed=self.config.seed if settings.shuffle_seed is None else settings.shuffle_seed,
            pool_tokens=settings.pool_tokens,
            device=self.device,
        )

    def recipe(self, cache: ActivationCache) -> Recipe:
        """What the run's dictionary is made of.

        Raises:
            FormatError: there is no dictionary at `train.start_from`.
        """
        config = self.config
        return Recipe(
            config.dictionary, config.train, config.seed, config.hook, folder=self.folder,
            metadata=dictionary_metadata(cache, config.hook), start=self.start,
        )  # fmt: skip

    def sinks(self) -> list[Wandb]:
        """Where the run's numbers go beside metrics.jsonl."""
        if not self.config.wandb.project:
            return []
        resumes = bool(list_checkpoints(self.folder / CHECKPOINTS))
        return [Wandb(self.config.wandb, self.folder, self.config.model_dump(), resume=resumes)]

    def _train(self, cache: ActivationCache) -> Dictionary:
        recipe, sinks, failed = self.recipe(cache), self.sinks(), True
        loader = self.loader(cache)
        self.progress("train", *self.trained_tokens(loader))
        try:
            sources = {recipe.source: loader}
            dictionary = train_one(sources, recipe, device=self.device, sinks=sinks, progress=self._show_training)
            failed = False
        finally:
            for sink in sinks:
                sink.close(failed=failed)
        return dictionary

    def trained_tokens(self, loader: ActivationLoader) -> tuple[int, int]:
        """Tokens that earlier processes trained on, and how many there will be."""
        settings, kept = self.config.train, list_checkpoints(self.folder / CHECKPOINTS)
        steps = int(kept[-1].name.removeprefix("step-")) if kept else 0
        tokens = settings.tokens or loader.tokens_per_epoch
        return steps * settings.batch_size, tokens // settings.batch_size * settings.batch_size

    def _show_training(self, done: int, total: int, metrics: Mapping[str, float | int]) -> None:
        self.progress("train", done, total)
        if isinstance(self.progress, Notes):
            self.progress.beside("train", falling(metrics))

    def _is_collected(self, folder: Path) -> bool:
        if not stands(folder / INDEX):
            return False
        activations = None
        if stands(self.config.cache_folder / MANIFEST):
            activations = self.cache().manifest.identity(self.config.hook)
        return is_store_of(folder, weights_sha256(self.dictionary("cpu")), activations, self.config.features)

    def trained_already(self, cache: ActivationCache) -> Dictionary:
        """The dictionary that is there, if it is the one asked for.

        Raises:
            FormatError: it was made with other settings.
        """
        dictionary = self.dictionary()
        of_data = {"activations": cache.manifest.identity(self.config.hook), **self._start_identity()}
        if other := other_setting(self.config, dictionary.metadata, of_data):
            key, held, asked = other
            raise FormatError(
                f"dictionary {str(self.folder / DICTIONARY)!r}: made with {key}={held!r}, now {asked!r} is asked for; "
                "choose another run folder (out=...), or delete the dictionary and checkpoints there"
            )
        steps = dictionary.metadata["trained"]["steps"]
        warn_of_missed_snapshots(self.folder, self.config.train, self.config.train.batch_size, steps)
        return dictionary

    def _start_identity(self) -> dict[str, Any]:
        """Hash of what training begins with; nothing where that has been deleted since."""
        try:
            return {"start": None if self.start is None else weights_sha256(self.start)}
        except FormatError:
            return {}


def run(config: RunConfig, progress: Progress = silent, *, features: bool = True) -> Run:
    """Harvest, train, evaluate, collect features: everything that is not there yet.

    Args:
        config: what to do.
        progress: called with (stage, tokens done, tokens in all).
        features: collect features at the end.

    Returns:
        The run, whose `dictionary()`, `evaluate()` and `features()` read what was made.
    """
    whole = Run(config, progress)
    whole.check()
    whole.check_space()
    whole.harvest()
    whole.train()
    if not whole.is_evaluated():
        whole.evaluate()
    if features:
        whole.features()
    return whole


def evaluate_runs(runs: Sequence[Run], at_once: int | None = None) -> list[Report]:
    """The reports on several runs' dictionaries, each also written into its folder.

    Runs with the same activations, model and evaluation settings are evaluated together, `at_once` at most; the reports
    on these are written before the next are evaluated.

    Raises:
        SaeError: as `Run.cache` and `sae.evaluation.evaluate` do.
    """
    models: dict[Hashable, LanguageModel] = {}
    groups: dict[Hashable, list[int]] = {}
    for number, run in enumerate(runs):
        config = run.config
        activations = run.cache().manifest.identity(config.hook)
        shared = (activations, config.hook, config.model, config.evaluation, run.device)
        groups.setdefault(shared, []).append(number)
    for run in runs:
        if stands(run.folder / METRICS_FILE):
            check(run.folder / METRICS_FILE, announce=False)  # not only when its curves are drawn
    reports: dict[int, Report] = {}
    for numbers in groups.values():
        first = runs[numbers[0]]
        key = (first.config.model, first.device)
        if key not in models:
            models[key] = first.language_model
        for start in range(0, len(numbers), at_once or len(numbers)):
            part = numbers[start : start + (at_once or len(numbers))]
            with contextlib.ExitStack() as stack:
                for folder in dict.fromkeys(runs[number].folder for number in part):
                    stack.enter_context(locked(folder, "evaluation"))
                reports |= _evaluate_group({number: runs[number] for number in part}, models[key])
    return [reports[number] for number in range(len(runs))]


def _evaluate_group(runs: dict[int, Run], language_model: LanguageModel) -> dict[int, Report]:
    first = next(iter(runs.values()))
    names = {number: f"run {str(run.folder)!r}" for number, run in runs.items()}
    cache, unfinished = first.cache(), first.folder / partial.FOLDER
    announce(first.progress, announcement(first.config.evaluation, cache, len(runs)))
    reports = evaluate_all(
        {names[number]: run.dictionary() for number, run in runs.items()},
        cache,
        hook=first.config.hook,
        language_model=language_model,
        settings=first.config.evaluation,
        device=first.device,
        progress=under(first.progress, "evaluate"),
        unfinished=unfinished,
    )
    for number, run in runs.items():
        first.progress("evaluate: tables and figures", 0, 1)
        write_report(reports[names[number]], run.folder, run.folder / METRICS_FILE)
        first.progress("evaluate: tables and figures", 1, 1)
    partial.discard(unfinished)
    return {number: reports[name] for number, name in names.items()}


def harvest(config: RunConfig, progress: Progress = silent) -> ActivationCache:
    """Cache the activations that `config` asks for; see `sae.activations.harvest.harvest`."""
    return Run(config, progress).harvest()


def collect_features(folder: str | Path, progress: Progress = silent, overrides: tuple[str, ...] = ()) -> Features:
    """The feature store of a run folder, collected where it is missing or stale; `overrides` as of `Run.open`."""
    return Run.open(folder, overrides, progress).features()
