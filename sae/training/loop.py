"""The loop: read, step, log, checkpoint; many dictionaries in one pass; stops cleanly, and resumes bit for bit."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError, TrainingError, TrainingInterrupted
from sae.files.paths import expanded
from sae.files.reading import taken_apart
from sae.files.writing import locked, missing_space
from sae.numerics.modes import present_mode, training_mode
from sae.training.agreement import common_pass
from sae.training.checkpoint import (
    CHECKPOINTS,
    STATE_FILE,
    CheckpointClock,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    snapshot_folder,
    training_bytes,
    warn_of_missed_snapshots,
)
from sae.training.meter import Meter, Stopwatch
from sae.training.recipe import Recipe
from sae.training.sinks import FeatureSink, JsonLines, Sink
from sae.training.source import BatchSource, IterableSource, origin
from sae.training.trainee import Trainee

Metrics = dict[str, float | int]
Progress = Callable[[int, int, Metrics], None]
_ONLY = "dictionary"


@dataclass(frozen=True)
class Cost:
    """What one dictionary of a common pass took.

    Attributes:
        seconds: in its own steps, without reading.
        tokens: trained on in this process.
        bytes: weights and optimiser.
    """

    seconds: float
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Outcome:
    """What came of a common pass, by the recipes' names.

    Attributes:
        dictionaries: the trained ones.
        failures: why the others stopped.
        costs: of all.
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
        source: batches `[batch, d_in]`, read from the beginning, or where the checkpoint was that training resumes
            from; its `statistics` set the normalisation.
        dictionary: architecture, d_sae, k.
        settings: how to train; `batch_size`, `pool_tokens` and `shuffle_seed` are the source's affair and not read
            here.
        target: what is reconstructed from the input where that is not the input itself (a transcoder): batches of the
            same tokens in the same order, with as many numbers a row.
        start: a dictionary for raw activations whose weights it begins with; `settings.start_from` is for run folders
            and refused here.
        seed: of the initialisation.
        device: where to train.
        folder: of `metrics.jsonl`, `checkpoints/`, from whose newest it resumes, and `snapshots/`; None: keep nothing.
            What is returned is not saved there: `save` it.
        metadata: saved with the dictionary. An `ActivationLoader` gives it hook point, model, token policy and text;
            entries here win. `activations` in it names the data: resuming on others is refused.
        sinks: further places for the logged numbers.
        progress: called after every logged step with (tokens done, tokens in all, metrics).

    Returns:
        The dictionary, normalisation folded in, in evaluation mode: it takes raw activations.

    Raises:
        TrainingInterrupted: Ctrl-C, after the state was saved.
        ConfigError: settings that contradict each other, or that have no effect on this architecture.
        TrainingError: fewer tokens than a batch; NaN; a checkpoint of other settings.
        CacheError: another process, or another thread, trains in the folder; or it cannot be written.
    """
    sources = {"input": source} if target is None else {"input": source, "target": target}
    recipe = Recipe(
        dictionary, settings or TrainConfig(), seed, "input", None if target is None else "target",
        None if folder is None else expanded(folder), metadata or {}, start,
    )  # fmt: skip
    outcome = train_all(
        sources, {_ONLY: recipe}, device=device, sinks={_ONLY: sinks},
        progress=None if progress is None else lambda done, of, metrics: progress(done, of, metrics[_ONLY]),
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

    Every batch is read once and used by each dictionary in turn. Each is what `train` alone would make of the same
    source, bit for bit on a CPU, and has a folder of its own. One that diverges drops out; the others go on.

    The caller's PyTorch modes (`no_grad`, `inference_mode`, `autocast`) hold for the sources alone: a step records
    gradients, in float32.

    Args:
        sources: by name; with the same batch size, tokens in the same order.
        recipes: by whatever names. They may differ in everything but batch size and number of tokens.
        device: where to train.
        sinks: further places for the logged numbers of each.
        progress: called after every logged step with (tokens done, tokens in all, metrics by name).

    Raises:
        TrainingInterrupted: Ctrl-C, after all states were saved.
        ConfigError: recipes or sources that do not fit each other; settings that contradict each other or that have no
            effect.
        TrainingError: fewer tokens than a batch; a checkpoint of other settings.
        CacheError: another process, or another thread, trains in one of the folders; or one cannot be written.
    """
    if not recipes:
        raise ConfigError("there is no recipe: give at least one dictionary to train")
    callers_mode = present_mode()
    with training_mode():
        return _Run(sources, recipes, torch.device(device), callers_mode).train(sinks or {}, progress)


@dataclass
class _Member:
    """One trainee and what surrounds it."""

    trainee: Trainee
    sinks: list[Sink] = field(default_factory=list)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.meter, self.stopwatch = Meter(self.trainee.batch_size), Stopwatch(self.trainee.dictionary.W_dec.device)

    @property
    def folder(self) -> Path | None:
        return self.trainee.recipe.folder

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.folder / CHECKPOINTS) if self.folder else []

    @property
    def keep(self) -> int:
        return self.trainee.settings.keep_checkpoints

    def cost(self) -> Cost:
        return Cost(self.stopwatch.seconds(), self.tokens, self.trainee.bytes())


@dataclass(frozen=True)
class _Read:
    """A batch of every source, and the places where they are after it."""

    batch: dict[str, Float[Tensor, "batch d_in"]]
    places: dict[str, dict[str, Any]]


class _Run:
    """One pass."""

    def __init__(
        self, sources: Mapping[str, BatchSource], recipes: Mapping[str, Recipe], device: torch.device,
        callers_mode: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:  # fmt: skip
        self.callers_mode = callers_mode
        used = {name for recipe in recipes.values() for name in (recipe.source, recipe.target) if name is not None}
        self.sources = {name: source for name, source in sources.items() if name in used}
        self.device = device
        first = next(iter(recipes.values()))
        self.batch_size, self.total_tokens = common_pass(sources, recipes, device)
        self.steps = self.total_tokens // self.batch_size
        self.log_every, self.checkpoint_every = first.settings.log_every, first.settings.checkpoint_every
        self.step = 0
        self.threshold_step = 0
        self.ahead: deque[_Read] = deque()
        self.places: dict[str, dict[str, Any]] | None = None  # of the newest step; None: where the sources are
        self.unreadable: Exception | None = None
        self.members = {name: _Member(self._trainee(recipe, sources)) for name, recipe in recipes.items()}
        self.failures: dict[str, str] = {}

    def _trainee(self, recipe: Recipe, sources: Mapping[str, BatchSource]) -> Trainee:
        target = None if recipe.target is None else sources[recipe.target]
        known = origin(sources[recipe.source], target)
        recipe = replace(recipe, metadata={**known, **recipe.metadata})
        return Trainee(recipe, sources[recipe.source], target, self.steps, self.device)

    def train(
        self,
        sinks: Mapping[str, Sequence[Sink]],
        progress: Callable[[int, int, dict[str, Metrics]], None] | None,
    ) -> Outcome:
        everyone = dict(self.members)
        with _stop_flag() as stop, contextlib.ExitStack() as stack:
            for member in everyone.values():
                if member.folder is not None:
                    stack.enter_context(locked(member.folder, "training"))
            self._resume()
            self._check_space()
            for name, member in everyone.items():
                member.sinks = list(sinks.get(name, ()))
                if member.folder is not None:
                    lines = JsonLines(member.folder, self.step)
                    stack.callback(lines.close)
                    member.sinks.insert(0, lines)
            self.batches = self._batches()
            clock = CheckpointClock(self.checkpoint_every, sum(map(_checkpoint_bytes, self.members.values())))
            while self.step < self.steps and self.members:
                batch = self._next()
                self.step += 1
                for member in self.members.values():
                    self._step(member, batch)
                last = self.step == self.steps
                if self.step % self.log_every == 0 or last:
                    self._drop_failed()
                    self._log(progress)
                self._snapshot()  # before the checkpoint, behind which a resumed training does not go back
                if stop.is_set() or clock.is_due(self.step, last=last):
                    with clock.writing():
                        self._checkpoint()
                if stop.is_set() and self.members:
                    raise TrainingInterrupted(self._interrupted())
        return Outcome(
            {name: member.trainee.folded() for name, member in self.members.items()},
            self.failures,
            {name: member.cost() for name, member in everyone.items()},
        )

    def _step(self, member: _Member, batch: dict[str, Tensor]) -> None:
        recipe = member.trainee.recipe
        raw = batch[recipe.source]
        with member.stopwatch:
            losses = member.trainee.step(raw, None if recipe.target is None else batch[recipe.target])
        member.meter.add(losses, member.trainee.variance)
        member.tokens += len(raw)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        for parts in zip(*self.sources.values(), strict=False):
            yield dict(zip(self.sources, parts, strict=True))

    def _next(self) -> dict[str, Float[Tensor, "batch d_in"]]:
        if self.ahead:
            read = self.ahead.popleft()
            self.places = read.places
            return read.batch
        if self.unreadable is not None:
            raise self.unreadable
        self.places, batch = None, self._read()
        if batch is None:
            raise TrainingError(f"the source ended after {self.step} steps of {self.steps}; lower train.tokens")
        return batch

    def _read(self) -> dict[str, Float[Tensor, "batch d_in"]] | None:
        """The next batch of the sources; None where there is no more."""
        with self.callers_mode():  # a source may run a language model
            batch = next(self.batches, None)
        if batch is None:
            return None
        for name, x in batch.items():
            if x.ndim != 2 or x.shape[1] != self.sources[name].d_in:
                raise TrainingError(f"a batch has shape {list(x.shape)}: expected [batch, {self.sources[name].d_in}]")
        epochs = {source.epoch for source in self.sources.values() if isinstance(source, IterableSource)}
        if len(epochs) > 1:
            raise TrainingError(
                f"at step {self.step + len(self.ahead) + 1} {' and '.join(self.sources)} are not of one length: one "
                "has begun anew and the other has not; give them as many batches each, row by row of the same tokens"
            )
        return {name: x.detach().to(self.device, torch.float32) for name, x in batch.items()}

    def _set_thresholds(self) -> None:
        """Of those that have one, for the weights as they are, from the batches that come next; once a step."""
        wanted = max((member.trainee.batches_ahead for member in self.members.values()), default=0)
        if self.threshold_step == self.step or wanted == 0:
            return
        self.places = self.places or self._source_places()
        try:
            while self.unreadable is None and len(self.ahead) < wanted and (batch := self._read()) is not None:
                copied = {name: x.clone() for name, x in batch.items()}  # an iterable may fill one buffer again
                self.ahead.append(_Read(copied, self._source_places()))
        except Exception as error:  # of a step that is not due yet, or never will be
            self.unreadable = error
        for member in self.members.values():
            trainee = member.trainee
            trainee.set_threshold_([read.batch[trainee.recipe.source] for read in self.ahead])
        self.threshold_step = self.step

    def _log(self, progress: Callable[[int, int, dict[str, Metrics]], None] | None) -> None:
        self._set_thresholds()
        metrics: dict[str, Metrics] = {}
        for name, member in self.members.items():
            trainee = member.trainee
            metrics[name] = {
                "step": self.step,
                "tokens": self.step * self.batch_size,
                **member.meter.read(),
                **trainee.metrics_now(),
            }
            for sink in member.sinks:
                sink.log(metrics[name])
            takers = [sink for sink in member.sinks if isinstance(sink, FeatureSink)]
            of_features = trainee.of_features() if takers else {}
            for sink in takers:
                sink.log_features(self.step, of_features)
        if progress and metrics:
            progress(self.step * self.batch_size, self.total_tokens, metrics)

    def _drop_failed(self) -> None:
        """Take those out whose loss was not finite. Waits for the device."""
        for name, member in list(self.members.items()):
            reason = member.trainee.failure()
            if reason is None:
                continue
            kept = member.checkpoints
            last = f"the last good checkpoint is {str(kept[-1])!r}" if kept else "there is no checkpoint yet"
            self.failures[name] = f"{reason}; {last}"
            del self.members[name]

    def _checkpoint(self) -> None:
        """Write all before any older one goes, so that a kill in between leaves a step that all have."""
        self._drop_failed()
        self._set_thresholds()
        for member in self.members.values():
            if member.folder is not None:
                trainee = member.trainee
                places = self._places(trainee.recipe)
                state = {**trainee.state_dict(), "sources": places, "meter": member.meter.state_dict()}
                save_checkpoint(member.folder / CHECKPOINTS, self.step, state, trainee.folded())
        for member in self.members.values():
            if member.folder is not None:
                prune_checkpoints(member.folder / CHECKPOINTS, member.keep)

    def _check_space(self) -> None:
        """Refuse to begin what cannot be kept.

        Raises:
            TrainingError: fewer bytes are free than the checkpoints and dictionaries need.
        """
        needs = {
            member.folder: training_bytes(_weights_bytes(member), member.trainee.bytes(), member.keep)
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
        """Save those dictionaries that were to be saved after a number of tokens that this step has reached."""
        before, now = (self.step - 1) * self.batch_size, self.step * self.batch_size
        due = {
            name for name, member in self.members.items()
            if any(before < at <= now for at in member.trainee.settings.snapshots)
        }  # fmt: skip
        if due:
            self._drop_failed()
            self._set_thresholds()
        for name in due & self.members.keys():
            member = self.members[name]
            assert member.folder is not None
            member.trainee.folded().save(snapshot_folder(member.folder, now))

    def _resume(self) -> None:
        """Go on from the newest step that all have.

        Raises:
            TrainingError: some have checkpoints, and no step is common to all; one was made with other settings; or two
                had their tokens in different orders.
        """
        kept = [{int(path.name.removeprefix("step-")): path for path in m.checkpoints} for m in self.members.values()]
        common = set.intersection(*map(set, kept)) if kept else set()
        self.step = max(common, default=0)
        read: dict[str, tuple[str, Any]] = {}
        for (name, member), paths in zip(self.members.items(), kept, strict=True):
            if paths:
                newest = paths[max(common or paths)]
                state = load_checkpoint(newest)
                with taken_apart(newest / STATE_FILE):
                    member.trainee.check_identity(state["identity"], f"checkpoint {str(newest)!r}")
                    if common:
                        self._check_same_places(name, member.trainee.recipe, state["sources"], read)
                        self._go_on(member, state)
        if common:
            return
        for source in self.sources.values():
            source.restart()
        if any(kept):
            names = [name for name, paths in zip(self.members, kept, strict=True) if paths]
            raise TrainingError(
                f"{', '.join(names)}: there are checkpoints, but of no step that all {len(kept)} have; train these "
                "apart from the others, or delete their checkpoints"
            )

    def _check_same_places(
        self, name: str, recipe: Recipe, places: dict[str, Any], read: dict[str, tuple[str, Any]]
    ) -> None:
        """Raise TrainingError where a member's sources were not where, or of the order that, they are for others."""
        for role, source in (("input", recipe.source), ("target", recipe.target)):
            if source is None:
                continue
            other, place = read.setdefault(source, (name, places[role]))
            if place != places[role]:
                raise TrainingError(
                    f"{other} and {name}: their checkpoints of step {self.step} are of different orders of the tokens "
                    f"({place} and {places[role]}); train them apart"
                )

    def _go_on(self, member: _Member, state: dict[str, Any]) -> None:
        """Take a member and its sources to where they were."""
        warn_of_missed_snapshots(member.folder, member.trainee.settings, self.batch_size, self.step)
        member.trainee.load_state_dict(state)
        if "meter" in state:
            member.meter.load_state_dict(state["meter"], self.device)
        recipe = member.trainee.recipe
        for role, name in (("input", recipe.source), ("target", recipe.target)):
            if name is not None:
                self.sources[name].load_state_dict(state["sources"][role])

    def _places(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """Where the sources of a recipe are, by what they are to it: their names differ from pass to pass."""
        names = {"input": recipe.source, "target": recipe.target}
        places = self.places or self._source_places()
        return {role: places[name] for role, name in names.items() if name is not None}

    def _source_places(self) -> dict[str, dict[str, Any]]:
        return {name: source.state_dict() for name, source in self.sources.items()}

    def _interrupted(self) -> str:
        folders = [member.folder for member in self.members.values() if member.folder is not None]
        if not folders:
            return f"stopped at step {self.step} of {self.steps}; without a run folder nothing is kept"
        where = f"{str(folders[0] / CHECKPOINTS)!r}" + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")
        return (
            f"stopped at step {self.step} of {self.steps}; the state is saved in {where}: run the same command again "
            "to go on"
        )


def _weights_bytes(member: _Member) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in member.trainee.dictionary.parameters())


def _checkpoint_bytes(member: _Member) -> int:
    """Of a state and of the dictionary beside it; 0 where none is written."""
    return 0 if member.folder is None else _weights_bytes(member) + member.trainee.bytes()


@contextlib.contextmanager
def _stop_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a termination signal sets, instead of breaking into the middle of a step."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda *_: flag.set()) for number in signals}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
