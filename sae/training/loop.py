"""The loop: read, step, log, checkpoint; many dictionaries in one pass; stops cleanly, and resumes bit for bit."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.origin import in_current_form
from sae.errors import ConfigError, TrainingError, TrainingInterrupted
from sae.files.paths import expanded
from sae.files.reading import taken_apart
from sae.files.writing import locked, missing_space
from sae.numerics.modes import present_mode, training_mode
from sae.training.check import common_pass
from sae.training.checkpoint import (
    CHECKPOINTS,
    STATE_FILE,
    CheckpointClock,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    snapshot_folder,
    training_bytes,
    warn_of_missed_snapshots,
)
from sae.training.member import Cost, Member, checkpoint_bytes, share_recorder, weights_bytes
from sae.training.reader import Reader
from sae.training.recipe import Recipe
from sae.training.signals import stop_flag
from sae.training.sinks import FeatureSink, JsonLines, Sink
from sae.training.source import BatchSource, metadata_of
from sae.training.trainer import Trainer

Metrics = dict[str, float | int]
Progress = Callable[[int, int, Metrics], None]
_ONLY = "dictionary"


@dataclass(frozen=True)
class Outcome:
    """Results of a common pass, by the recipes' names.

    Attributes:
        dictionaries: those that finished training.
        failures: why the others stopped.
        costs: costs of all of them.
    """

    dictionaries: dict[str, Dictionary]
    failures: dict[str, str]
    costs: dict[str, Cost]


def train(
    source: BatchSource,
    dictionary: DictionaryConfig,
    settings: TrainConfig | None = None,
    *,
    target: BatchSource | None = None,
    start: Dictionary | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
) -> Dictionary:
    """Train a dictionary on a stream of activations.

    Args:
        source: batches `[batch, d_in]`, read from the beginning, or from the checkpoint that training resumes from; its
            `statistics` set the normalisation.
        dictionary: architecture, d_sae, k.
        settings: how to train; `batch_size`, `pool_tokens` and `shuffle_seed` belong to the source and are not read
            here.
        target: reconstruction target, if it is not the input itself (a transcoder): batches of the same tokens in the
            same order, of any width.
        start: a dictionary for raw activations whose weights training starts from; `settings.start_from` is for run
            folders and refused here.
        seed: seed of the initialisation.
        device: where to train.
        folder: folder for `metrics.jsonl`, `checkpoints/` and `snapshots/`; training resumes from its newest
            checkpoint. None: keep nothing. The returned dictionary is not saved there: `save` it.
        metadata: saved with the dictionary. An `ActivationLoader` adds hook point, model, token policy and text;
            entries given here win. The entry `activations` names the data: resuming on other data is refused.
        sinks: additional sinks for the logged numbers.
        progress: called after every logged step with (tokens done, total tokens, metrics).

    Returns:
        The dictionary, normalisation folded in, in evaluation mode: it takes raw activations.

    Raises:
        TrainingInterrupted: Ctrl-C, after the state was saved.
        ConfigError: settings contradict each other, or have no effect on this architecture.
        TrainingError: fewer tokens than a batch; NaN; a checkpoint made with other settings.
        CacheError: another process or thread trains in the folder, or the folder cannot be written.
    """
    sources = {"input": source} if target is None else {"input": source, "target": target}
    recipe = Recipe(
        dictionary, settings or TrainConfig(), seed, "input", None if target is None else "target",
        None if folder is None else expanded(folder), metadata or {}, start,
    )  # fmt: skip
    return train_one(sources, recipe, device, sinks, progress)


def train_one(
    sources: Mapping[str, BatchSource], recipe: Recipe, device: str | torch.device, sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
) -> Dictionary:  # fmt: skip
    """`train` with a recipe, which names one or two of the sources.

    Raises:
        SaeError: for the same reasons as `train`.
    """
    outcome = train_all(
        sources, {_ONLY: recipe}, device=device, sinks={_ONLY: sinks},
        progress=None if progress is None else lambda done, total, metrics: progress(done, total, metrics[_ONLY]),
    )  # fmt: skip
    if outcome.failures:
        raise TrainingError(outcome.failures[_ONLY])
    return outcome.dictionaries[_ONLY]


def train_all(
    sources: Mapping[str, BatchSource],
    recipes: Mapping[str, Recipe],
    *,
    device: str | torch.device = "cpu",
    sinks: Mapping[str, Sequence[Sink]] | None = None,
    progress: Callable[[int, int, dict[str, Metrics]], None] | None = None,
) -> Outcome:
    """Train many dictionaries in one pass over the activations.

    Every batch is read once and used by each dictionary in turn. Each result equals what `train` alone makes from the
    same source, bit for bit on a CPU. Each dictionary has its own folder. One that diverges drops out; the others
    continue.

    The caller's PyTorch modes (`no_grad`, `inference_mode`, `autocast`) apply to the sources alone: a step records
    gradients, in float32.

    Args:
        sources: sources by name, with the same batch size and tokens in the same order.
        recipes: recipes by any names. They may differ in everything but batch size and number of tokens.
        device: where to train.
        sinks: additional sinks for the logged numbers, by recipe name.
        progress: called after every logged step with (tokens done, total tokens, metrics by name).

    Raises:
        TrainingInterrupted: Ctrl-C, after all states were saved.
        ConfigError: recipes or sources do not fit together; settings contradict each other or have no effect.
        TrainingError: fewer tokens than a batch; a checkpoint made with other settings.
        CacheError: another process or thread trains in one of the folders, or a folder cannot be written.
    """
    if not recipes:
        raise ConfigError("there is no recipe: give at least one dictionary to train")
    callers_mode = present_mode()
    with training_mode():
        return _Run(sources, recipes, torch.device(device), callers_mode).train(sinks or {}, progress)


class _Run:
    """One pass."""

    def __init__(
        self, sources: Mapping[str, BatchSource], recipes: Mapping[str, Recipe], device: torch.device,
        callers_mode: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        used = {name for recipe in recipes.values() for name in recipe.sources.values()}
        self.sources = {name: source for name, source in sources.items() if name in used}
        self.device = device
        first = next(iter(recipes.values()))
        self.batch_size, self.total_tokens = common_pass(sources, recipes, device)
        self.steps = self.total_tokens // self.batch_size
        self.log_every, self.checkpoint_every = first.settings.log_every, first.settings.checkpoint_every
        self.step = 0
        self.threshold_step = 0
        self.reader = Reader(self.sources, device, callers_mode)
        self.members: dict[str, Member] = {}
        for name, recipe in recipes.items():
            source, target = sources[recipe.source], None if recipe.target is None else sources[recipe.target]
            metadata = in_current_form({**metadata_of(source, target), **recipe.metadata})
            trainer = Trainer(replace(recipe, metadata=metadata), source, target, self.steps, device)
            self.members[name] = Member(trainer)
        self.batches = share_recorder(self.members.values(), device)
        self.failures: dict[str, str] = {}

    def train(
        self,
        sinks: Mapping[str, Sequence[Sink]],
        progress: Callable[[int, int, dict[str, Metrics]], None] | None,
    ) -> Outcome:
        all_members = dict(self.members)
        with stop_flag() as stop, contextlib.ExitStack() as stack:
            for member in all_members.values():
                if member.folder is not None:
                    stack.enter_context(locked(member.folder, "training"))
            self._resume()
            self._check_space()
            for name, member in all_members.items():
                member.sinks = list(sinks.get(name, ()))
                if member.folder is not None:
                    lines = JsonLines(member.folder, self.step)
                    stack.callback(lines.close)
                    member.sinks.insert(0, lines)
            stack.enter_context(self.reader.reading(self.step, self.steps))
            clock = CheckpointClock(self.checkpoint_every, sum(map(checkpoint_bytes, self.members.values())))
            self.reader.stop_when(stop.is_set)
            while self.step < self.steps and self.members:
                batch = self._next(stop)
                if batch is None:
                    raise TrainingError(f"the source ended after {self.step} steps of {self.steps}; lower train.tokens")
                self.step += 1
                if self.batches is not None:
                    batch = self.batches.keep(batch)
                for member in self.members.values():
                    recipe = member.trainer.recipe
                    member.step(batch[recipe.source], None if recipe.target is None else batch[recipe.target])
                last = self.step == self.steps
                if self.step % self.log_every == 0 or last:
                    self._drop_failed()
                    self._log(progress)
                self._snapshot()  # before the checkpoint, because a resumed training starts after it
                if stop.is_set() or clock.is_due(self.step, last=last):
                    with clock.writing():
                        self._checkpoint()
                if stop.is_set() and self.members:
                    raise TrainingInterrupted(self._interrupted())
        return Outcome(
            {name: member.trainer.folded() for name, member in self.members.items()},
            self.failures,
            {name: member.cost() for name, member in all_members.items()},
        )

    def _next(self, stop: threading.Event) -> dict[str, Tensor] | None:
        """The next batch; if a source stopped for Ctrl-C before it had one, save the state and stop."""
        try:
            return self.reader.next()
        except TrainingInterrupted:
            if not stop.is_set() or self.step == 0:
                raise
            self._checkpoint()
            raise TrainingInterrupted(self._interrupted()) from None

    def _set_thresholds(self) -> None:
        """Set thresholds for the current weights from the next batches, if an architecture has one; once a step."""
        count = max((member.trainer.batches_ahead for member in self.members.values()), default=0)
        if self.threshold_step == self.step or count == 0:
            return
        ahead = self.reader.look_ahead(count)
        for member in self.members.values():
            member.trainer.set_threshold_([batch[member.trainer.recipe.source] for batch in ahead])
        self.threshold_step = self.step

    def _log(self, progress: Callable[[int, int, dict[str, Metrics]], None] | None) -> None:
        self._set_thresholds()
        metrics: dict[str, Metrics] = {}
        for name, member in self.members.items():
            trainer = member.trainer
            metrics[name] = {
                "step": self.step,
                "tokens": self.step * self.batch_size,
                **member.meter.read(),
                **trainer.metrics_now(),
            }
            for sink in member.sinks:
                sink.log(metrics[name])
            feature_sinks = [sink for sink in member.sinks if isinstance(sink, FeatureSink)]
            feature_metrics = trainer.feature_metrics() if feature_sinks else {}
            for sink in feature_sinks:
                sink.log_features(self.step, feature_metrics)
        if progress and metrics:
            progress(self.step * self.batch_size, self.total_tokens, metrics)

    def _drop_failed(self) -> None:
        """Remove members whose loss was not finite. Waits for the device."""
        for name, member in list(self.members.items()):
            if reason := member.trainer.failure():
                paths = member.checkpoints
                last = f"the last good checkpoint is {str(paths[-1])!r}" if paths else "there is no checkpoint yet"
                self.failures[name] = f"{reason}; {last}"
                del self.members[name]

    def _checkpoint(self) -> None:
        """Write all states before deleting older ones: a kill in between leaves a step that all members have."""
        self._drop_failed()
        self._set_thresholds()
        for member in self.members.values():
            if member.folder is not None:
                trainer = member.trainer
                places = self.reader.places_of(trainer.recipe)
                state = {**trainer.state_dict(), "sources": places, "meter": member.meter.state_dict()}
                save_checkpoint(member.folder / CHECKPOINTS, self.step, state, trainer.folded())
        for member in self.members.values():
            if member.folder is not None:
                prune_checkpoints(member.folder / CHECKPOINTS, member.keep)

    def _check_space(self) -> None:
        """Raise TrainingError if the disk has too little room for the checkpoints and dictionaries."""
        needs = {
            member.folder: training_bytes(weights_bytes(member), member.trainer.bytes(), member.keep)
            - sum(file.stat().st_size for path in member.checkpoints for file in path.iterdir())
            for member in self.members.values()
            if member.folder is not None and self.step < self.steps
        }
        if short := missing_space(needs):
            raise TrainingError(
                f"disk full: checkpoints and dictionary in {short}: free some space and run the same command again, or "
                "lower train.keep_checkpoints or dictionary.d_sae"
            )

    def _snapshot(self) -> None:
        """Save the dictionaries that have a snapshot due at this step."""
        before, now = (self.step - 1) * self.batch_size, self.step * self.batch_size
        due = {
            name for name, member in self.members.items()
            if any(before < tokens <= now for tokens in member.trainer.settings.snapshots)
        }  # fmt: skip
        if due:
            self._drop_failed()
            self._set_thresholds()
        for name in due & self.members.keys():
            member = self.members[name]
            assert member.folder is not None
            member.trainer.folded().save(snapshot_folder(member.folder, now))

    def _resume(self) -> None:
        """Continue from the newest step that all members have.

        Raises:
            TrainingError: some members have checkpoints, but no step is common to all; a checkpoint was made with other
                settings; or two members read their tokens in different orders.
        """
        saved = [{int(path.name.removeprefix("step-")): path for path in m.checkpoints} for m in self.members.values()]
        common = set.intersection(*map(set, saved)) if saved else set()
        self.step = max(common, default=0)
        first_places: dict[str, tuple[str, Any]] = {}
        for (name, member), paths in zip(self.members.items(), saved, strict=True):
            if paths:
                newest = paths[max(common or paths)]
                state = load_checkpoint(newest)
                with taken_apart(newest / STATE_FILE):
                    member.trainer.check_identity(state["identity"], f"checkpoint {str(newest)!r}")
                    if common:
                        self._check_same_places(name, member.trainer.recipe, state["sources"], first_places)
                        self._restore(member, state)
        if common:
            return
        for source in self.sources.values():
            source.restart()
        if any(saved):
            names = [name for name, paths in zip(self.members, saved, strict=True) if paths]
            raise TrainingError(
                f"{', '.join(names)}: there are checkpoints, but of no step that all {len(saved)} have; train these "
                "separately from the others, or delete their checkpoints"
            )

    def _check_same_places(
        self, name: str, recipe: Recipe, places: dict[str, Any], first_places: dict[str, tuple[str, Any]]
    ) -> None:
        """Raise TrainingError if a member's sources had another place or order than the same sources of others."""
        for role, source in recipe.sources.items():
            other, place = first_places.setdefault(source, (name, places[role]))
            if place != places[role]:
                raise TrainingError(
                    f"{other} and {name}: their checkpoints of step {self.step} have different orders of the tokens "
                    f"({place} and {places[role]}); train them separately"
                )

    def _restore(self, member: Member, state: dict[str, Any]) -> None:
        """Restore a member and the places of its sources from a state."""
        warn_of_missed_snapshots(member.folder, member.trainer.settings, self.batch_size, self.step)
        member.trainer.load_state_dict(state)
        if "meter" in state:
            member.meter.load_state_dict(state["meter"], self.device)
        for role, name in member.trainer.recipe.sources.items():
            self.sources[name].load_state_dict(state["sources"][role])

    def _interrupted(self) -> str:
        folders = [member.folder for member in self.members.values() if member.folder is not None]
        if not folders:
            return f"stopped at step {self.step} of {self.steps}; without a run folder nothing is kept"
        places = f"{str(folders[0] / CHECKPOINTS)!r}" + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")
        return (
            f"stopped at step {self.step} of {self.steps}; the state is saved in {places}: run the same command again "
            "to continue"
        )
