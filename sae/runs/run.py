"""A run: its folder, configuration and steps, from harvest to features; each step skips work that is already done."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.harvest import harvest as harvest_activations
from sae.activations.harvest import hook_widths
from sae.activations.manifest import MANIFEST, read_manifest
from sae.activations.metadata import joint_origin
from sae.activations.order import ShuffledSource
from sae.activations.same_model import check_same_model
from sae.activations.same_request import check_same_request
from sae.architectures import load
from sae.config.check import amount_notes, check_amounts
from sae.config.environment import choose_device, memory_of
from sae.config.patterns import has_patterns, with_hook_points
from sae.config.progress import Notes, Progress, announce, silent, under, within
from sae.config.settings import RunConfig
from sae.dictionary.base import CONFIG_FILE, Dictionary
from sae.dictionary.model_identity import model_label
from sae.dictionary.saved import identify, weights_sha256
from sae.errors import ConfigError, FormatError, ModelError
from sae.evaluation import Report, evaluate_all, partial, write_report
from sae.evaluation.budget import announcement
from sae.evaluation.report import JSON_FILE as REPORT_FILE
from sae.evaluation.stored import StoredReport, read_stored
from sae.features import Features, collect
from sae.features.layout import INDEX
from sae.features.store import is_store_of
from sae.files.formats import as_read_back
from sae.files.hashes import check
from sae.files.reading import as_object, read_object
from sae.files.version import __version__
from sae.files.writing import locked, stands
from sae.model.language_model import LanguageModel
from sae.probing.record import PROBES, ProbeRecord
from sae.runs.disk import check_disk
from sae.runs.folder import DICTIONARY, configured, open_config, other_setting
from sae.runs.recipe import check_run_recipe, check_sites, run_recipe, with_joined
from sae.runs.sources import Sources, training_sources
from sae.training.checkpoint import CHECKPOINTS, list_checkpoints, warn_of_missed_snapshots
from sae.training.loop import train_one
from sae.training.meter import falling
from sae.training.recipe import Recipe
from sae.training.sinks import METRICS_FILE, Wandb, check_wandb, closing
from sae.training.traits import check_read


class Run:
    """A run folder and its configuration. The language model is loaded once, when a step needs it.

    Args:
        config: the configuration. Patterns of hook points in it are replaced by the model's hook points, for which the
            model is loaded.
        progress: called with (stage, tokens done, tokens in total).
    """

    def __init__(self, config: RunConfig, progress: Progress = silent) -> None:
        self.config, self.progress = config, progress
        if has_patterns(config):
            self.config = with_hook_points(config, self._hook_points)
        self.folder = config.folder

    @staticmethod
    def open(folder: str | Path, overrides: tuple[str, ...] = (), progress: Progress = silent) -> Run:
        """Open an existing run folder by its `config.yaml`; the folder may have been moved.

        Raises SaeError for the reasons of `sae.runs.folder.open_config`.
        """
        return Run(open_config(folder, overrides), progress)

    @cached_property
    def device(self) -> torch.device:
        """The device that the run computes on."""
        return choose_device(self.config.device)

    @cached_property
    def language_model(self) -> LanguageModel:
        """The model of `config.model`."""
        stage = f"load {model_label(self.config.model.name)}"
        self.progress(stage, 0, 1)
        language_model = LanguageModel(self.config.model, self.device)
        self.progress(stage, 1, 1)
        return language_model

    @cached_property
    def start(self) -> Dictionary | None:
        """The dictionary of `train.start_from`, with which training begins.

        Raises:
            FormatError: it does not exist. Resuming needs it too, to check that its weights are unchanged.
        """
        place = self.config.train.start_from
        if place is None:
            return None
        try:
            return load(place)
        except FormatError as error:
            raise FormatError(
                f"train.start_from: {error} (training that has begun needs the same weights to resume)"
            ) from error

    def _hook_points(self) -> list[str]:
        """The model's hook points; if it cannot be loaded, those of the existing cache."""
        folder = self.config.cache_folder
        try:
            return [hook.name for hook in self.language_model.hooks()]
        except ModelError as error:
            if not stands(folder / MANIFEST):
                raise
            announce(self.progress, f"patterns stand for hook points of cache {str(folder)!r}, since {error}")
            return list(read_manifest(folder).hooks)

    def say_hook(self) -> None:
        """Say which hook point is trained on, if several are harvested and none is named."""
        if self.config.hook_note is not None:
            announce(self.progress, self.config.hook_note)

    def harvest(self) -> ActivationCache:
        """The activation cache; missing parts are harvested."""
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
        """The existing activation cache; with `text`, its text must also be unchanged.

        Raises:
            CacheError: it is missing, unfinished, or made with other settings.
        """
        cache = ActivationCache(self.config.cache_folder)
        check_same_request(cache.path, cache.manifest, self.config, text=text)
        return cache

    def check(self) -> None:
        """Find settings that cannot be trained or evaluated, before hours of harvesting.

        Raises:
            ConfigError: the settings name several dictionaries, a setting has no effect, amounts of tokens cannot work
                (see `sae.config.check.check_amounts`), a transcoder's target comes before its input, parameters to
                freeze do not exist, or the dictionary to start from has another d_sae (d_in is checked later).
            FormatError: there is no dictionary at `train.start_from`.
        """
        if self.config.sweep:
            raise ConfigError("sweep names several dictionaries: train them with 'sae sweep', or remove sweep")
        check_amounts(self.config)
        check_sites(self.config)
        if self.is_trained():
            return
        check_wandb(self.config.wandb)
        check_read(self.config.dictionary, self.config.train)  # before a dictionary to start from is read
        check_run_recipe(self.config, self.start, memory_of(self.device))

    def check_space(self) -> None:
        """Check before the harvest that everything the run writes fits on the disk.

        Raises:
            CacheError: activations, checkpoints and dictionary need more than the free space.
        """
        config, folder = self.config, self.config.cache_folder
        if stands(folder / MANIFEST) and read_manifest(folder).complete:
            return  # the harvest checks files to restore, and training checks the rest
        check_disk(config, hook_widths(config, self.language_model), is_trained=self.is_trained())

    def train(self) -> Dictionary:
        """The dictionary; trained, or its training finished, if it does not exist yet."""
        self.check()
        cache = self.cache(text=True)
        if self.is_trained():
            return self.trained_already(cache)
        announce(self.progress, *amount_notes(self.config))
        with locked(self.folder, "training"):
            if self.is_trained():  # by another process in the meantime
                return self.trained_already(cache)
            with configured(self.config):
                recipe, sources = self.recipe(cache), self.sources(cache, self.config.hooks)
                self.progress("train", *self.trained_tokens(sources[self.config.hooks[0]]))
                with closing(self.sinks()) as sinks:
                    dictionary = train_one(
                        with_joined(sources, [self.config]), recipe, self.device, sinks, self._show_training
                    )
                dictionary.save(self.folder / DICTIONARY)
        return dictionary

    def is_trained(self) -> bool:
        """Whether the dictionary exists, whatever its settings were."""
        return stands(self.folder / DICTIONARY / CONFIG_FILE)

    def evaluate(self) -> Report:
        """The report on the run's dictionary, also written as `eval.json` and `eval.md`."""
        self.cache()
        self.check_metrics()
        return self.evaluate_together([self])[0]

    def evaluate_together(self, runs: Sequence[Run]) -> list[Report]:
        """Reports on the dictionaries of runs with this run's activations, model and evaluation settings.

        Each is also written into its run's folder.
        """
        language_model, unfinished = self.language_model, self.folder / partial.FOLDER
        names = {run.folder: f"run {str(run.folder)!r}" for run in runs}
        with contextlib.ExitStack() as stack:
            for folder in names:
                stack.enter_context(locked(folder, "evaluation"))
            cache = self.cache()
            dictionaries = {names[run.folder]: run.dictionary() for run in runs}
            announce(self.progress, announcement(self.config.evaluation, cache, dictionaries.values()))
            reports = evaluate_all(
                dictionaries,
                cache,
                hook=self.config.gives,
                language_model=language_model,
                settings=self.config.evaluation,
                device=self.device,
                progress=under(self.progress, "evaluate"),
                unfinished=unfinished,
            )
            for run in runs:
                self.progress("evaluate: tables and figures", 0, 1)
                write_report(reports[names[run.folder]], run.folder, run.folder / METRICS_FILE)
                self.progress("evaluate: tables and figures", 1, 1)
            partial.discard(unfinished)
        return [reports[names[run.folder]] for run in runs]

    def check_metrics(self) -> None:
        """Raise DamagedError if the metrics of the training are damaged, before an evaluation that draws them."""
        if stands(self.folder / METRICS_FILE):
            check(self.folder / METRICS_FILE, announce=False)

    def is_evaluated(self) -> bool:
        """Whether a complete evaluation exists for this dictionary, cache, hook point, settings and package version."""
        return self._stored(self.cache().manifest.identity(self.config.gives)) is not None

    def report(self) -> StoredReport:
        """The stored report on the run's dictionary. Nothing is evaluated, and the activations may be deleted.

        Raises:
            FormatError: there is none for this dictionary, hook point, settings and package version: call `evaluate`.
            DamagedError: a file of it is damaged.
        """
        path, stored = self.folder / REPORT_FILE, None
        if stands(path):
            stored = self._stored(self._activations(self.config.gives) or str(read_object(path).get("activations")))
        if stored is None:
            raise FormatError(
                f"run {str(self.folder)!r}: no evaluation of this dictionary with these settings by sae {__version__} "
                f"there; make it with 'sae eval {self.folder}'"
            )
        return StoredReport(*stored)

    def probes(self) -> ProbeRecord:
        """The stored probe results of the run's dictionary, as `sae.probe_run` returns them. Nothing is probed.

        Raises:
            FormatError: there are none for this dictionary and package version; `sae.probe_run` makes them.
            DamagedError: the file is damaged.
        """
        path = self.folder / PROBES.index
        subject = as_object(path, read_object(path).get("subject", {})) if stands(path) else {}
        record = ProbeRecord.read(self.folder, subject)
        if not record.entries or subject.get("dictionary") != as_read_back(identify(self.dictionary("cpu"))):
            raise FormatError(
                f"run {str(self.folder)!r}: no probe results of this dictionary by sae {__version__} there; make them "
                f"with 'sae probe {self.folder} DATA'"
            )
        return record

    def _stored(self, activations: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The stored report, if it is on these activations."""
        identity, config = identify(self.dictionary("cpu")), self.config
        return read_stored(self.folder, identity, activations, hook=config.gives, settings=config.evaluation)

    def _activations(self, hook: str) -> str | None:
        """The hash of the activations; None if they have been deleted."""
        manifest = self.config.cache_folder / MANIFEST
        return self.cache().manifest.identity(hook) if stands(manifest) else None

    def features(self) -> Features:
        """The feature store; collected if it is missing or of another dictionary, cache or setting.

        If the activations have been deleted, a store of this dictionary is enough.

        Raises:
            DamagedError: a file of the store is damaged.
            CacheError: another process is collecting features there.
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
        """The trained dictionary, on `device` or the run's device."""
        return load(self.folder, device=device or self.device)

    def sources(self, cache: ActivationCache, hooks: Sequence[str], stage: str = "train") -> Sources:
        """Batches of hook points, in the order in which the run's dictionary is trained on them, in this stage."""

        def fill(done: int, total: int) -> None:
            if isinstance(self.progress, Notes):
                self.progress.beside(stage, f"fills the pool: {done / total:.0%}")

        return training_sources(self.config, cache, hooks, lambda: self.language_model, self.device, fill)

    def recipe(self, cache: ActivationCache) -> Recipe:
        """The recipe of the run's dictionary; FormatError if there is no dictionary at `train.start_from`."""
        return run_recipe(self.config, cache, self.start, self.folder)

    def sinks(self) -> list[Wandb]:
        """Destinations of the run's metrics other than metrics.jsonl."""
        if not self.config.wandb.project:
            return []
        resumes = bool(list_checkpoints(self.folder / CHECKPOINTS))
        return [Wandb(self.config.wandb, self.folder, self.config.model_dump(), resume=resumes)]

    def trained_tokens(self, source: ShuffledSource) -> tuple[int, int]:
        """Tokens that earlier processes trained on, and tokens in total."""
        settings, checkpoints = self.config.train, list_checkpoints(self.folder / CHECKPOINTS)
        steps = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
        tokens = settings.tokens or source.tokens_per_epoch
        return steps * settings.batch_size, tokens // settings.batch_size * settings.batch_size

    def _show_training(self, done: int, total: int, metrics: Mapping[str, float | int]) -> None:
        self.progress("train", done, total)
        if isinstance(self.progress, Notes):
            self.progress.beside("train", falling(metrics))

    def _is_collected(self, folder: Path) -> bool:
        if not stands(folder / INDEX):
            return False
        activations = self._activations(self.config.hook)
        return is_store_of(folder, weights_sha256(self.dictionary("cpu")), activations, self.config.features)

    def trained_already(self, cache: ActivationCache) -> Dictionary:
        """The existing dictionary, if its settings are the requested ones.

        Raises:
            FormatError: it was made with other settings.
        """
        dictionary = self.dictionary()
        data_identity = {"activations": joint_origin(cache, self.config.reads).activations, **self._start_identity()}
        if other := other_setting(self.config, dictionary.metadata, data_identity):
            key, recorded, requested = other
            raise FormatError(
                f"dictionary {str(self.folder / DICTIONARY)!r}: made with {key}={recorded!r}, now {requested!r} is "
                "asked for; choose another run folder (out=...), or delete the dictionary and checkpoints there"
            )
        steps = dictionary.metadata["trained"]["steps"]
        warn_of_missed_snapshots(self.folder, self.config.train, self.config.train.batch_size, steps)
        return dictionary

    def _start_identity(self) -> dict[str, Any]:
        """Hash of the dictionary that training began with; empty if that has been deleted since."""
        try:
            return {"start": None if self.start is None else weights_sha256(self.start)}
        except FormatError:
            return {}
