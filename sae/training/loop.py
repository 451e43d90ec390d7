"""The loop: normalise, step, count, log, checkpoint; stop cleanly on Ctrl-C and on NaN; resume bit for bit."""

from __future__ import annotations

import contextlib
import copy
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import sae
from sae.architectures import ARCHITECTURES
from sae.config import DictionaryConfig, TrainConfig
from sae.dictionary import Dictionary
from sae.errors import ConfigError, SaeError, TrainingError
from sae.kernels.products import cpu_has_bfloat16
from sae.training.checkpoint import CHECKPOINTS, list_checkpoints, load_checkpoint, save_checkpoint
from sae.training.firing import FiringRecord
from sae.training.initialise import initialise_
from sae.training.meter import Meter
from sae.training.objectives import OBJECTIVES, Context, Losses
from sae.training.optimizer import FeatureAdam
from sae.training.schedules import default_learning_rate, l1_weight, learning_rate
from sae.training.sinks import JsonLines, Sink
from sae.training.source import BatchSource

THRESHOLD_RATE = 0.03
"""Weight of the newest batch in BatchTopK's threshold: a mean over some thirty batches keeps up with training."""

Progress = Callable[[int, int, dict[str, float | int]], None]


class TrainingInterrupted(SaeError):  # noqa: N818  it is no error
    """Ctrl-C: the state is saved, and the same command goes on."""


@dataclass(frozen=True)
class Normalisation:
    """x ↦ (x − mean) · scale, after which E‖x‖² = d_in."""

    mean: Float[Tensor, " d_in"]
    scale: float

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return (x - self.mean) * self.scale


def train(
    source: BatchSource,
    dictionary: DictionaryConfig,
    settings: TrainConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    sinks: Sequence[Sink] = (),
    progress: Progress | None = None,
) -> Dictionary:
    """Train a dictionary on a stream of activations.

    Args:
        source: batches `[batch, d_in]`; its `statistics` set the normalisation.
        dictionary: architecture, d_sae, k.
        settings: how to train; `batch_size` and `pool_tokens` are the source's affair and not read here.
        seed: of the initialisation.
        device: where to train.
        folder: run folder for `metrics.jsonl` and `checkpoints/`, from whose newest it resumes; None: keep nothing.
        metadata: saved with the dictionary; `activations` in it names the data: resuming on others is refused.
        sinks: further places for the logged numbers.
        progress: called after every logged step with (tokens done, tokens in all, metrics).

    Returns:
        The dictionary, normalisation folded in, in evaluation mode: it takes raw activations.

    Raises:
        TrainingInterrupted: Ctrl-C, after the state was saved.
        TrainingError: fewer tokens than a batch; NaN; a checkpoint of other settings.
    """
    settings = settings or TrainConfig()
    return _Run(source, dictionary, settings, seed, torch.device(device), folder, metadata or {}).train(sinks, progress)


class _Run:
    """State of one training run."""

    def __init__(
        self,
        source: BatchSource,
        shape: DictionaryConfig,
        settings: TrainConfig,
        seed: int,
        device: torch.device,
        folder: str | Path | None,
        metadata: dict[str, Any],
    ) -> None:
        self.source, self.settings, self.device = source, settings, device
        self.folder = Path(folder).expanduser() if folder is not None else None
        self.metadata, self.architecture = metadata, shape.architecture
        self.identity = {**_identity(source, shape, settings, seed), "activations": metadata.get("activations")}
        self.total_tokens = _total_tokens(source, settings)
        self.steps = self.total_tokens // source.batch_size
        self.step = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.dictionary = _build(shape, source.d_in).to(device)
        self.rate = settings.lr or default_learning_rate(shape.d_sae)
        self.k_aux = settings.k_aux or max(1, source.d_in // 2)
        self.normalisation = _normalisation(source, settings.center, device)
        self.optimizer = FeatureAdam(
            self.dictionary, settings.beta1, settings.beta2, low_precision=_in_bfloat16(settings, device)
        )
        self.firing = FiringRecord(shape.d_sae, settings.dead_after_tokens, device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_input = torch.zeros((), dtype=torch.bool, device=device)

    def train(self, sinks: Sequence[Sink], progress: Progress | None) -> Dictionary:
        self._resume()
        own = [JsonLines(self.folder, self.step)] if self.folder else []
        meter = Meter(self.source.batch_size)
        with _stop_flag() as stop, contextlib.ExitStack() as stack:
            for sink in own:
                stack.callback(sink.close)
            batches = iter(self.source)
            while self.step < self.steps:
                x = self._next(batches)
                if self.step == 0:
                    initialise_(self.dictionary, x, self.generator)
                    self.optimizer.refresh()
                losses = self._step(x)
                meter.add(x, losses)
                last = self.step == self.steps
                if self.step % self.settings.log_every == 0 or last:
                    self._check_finite()
                    metrics = self._metrics(meter)
                    for sink in (*own, *sinks):
                        sink.log(metrics)
                    if progress:
                        progress(self.step * self.source.batch_size, self.total_tokens, metrics)
                if self.step % self.settings.checkpoint_every == 0 or last or stop.is_set():
                    self._checkpoint()
                if stop.is_set():
                    raise TrainingInterrupted(self._interrupted())
        return self.folded()

    def folded(self) -> Dictionary:
        """A copy that takes raw activations."""
        copied = copy.deepcopy(self.dictionary).cpu().eval().requires_grad_(False)
        copied.fold_normalisation_(self.normalisation.mean.cpu(), self.normalisation.scale)
        silent = self.firing.silent_tokens.cpu()
        copied.metadata = {
            **self.metadata,
            "sae_version": sae.__version__,
            "trained": {
                "tokens": self.step * self.source.batch_size,
                "steps": self.step,
                "normalisation_scale": self.normalisation.scale,
                "dead": int((silent >= self.settings.dead_after_tokens).sum()),
                "dead_after_tokens": self.settings.dead_after_tokens,
                "settings": self.identity,
            },
        }
        return copied

    def _next(self, batches: Iterator[Tensor]) -> Tensor:
        x = next(batches, None)
        if x is None:
            raise TrainingError(f"the source ended after {self.step} steps of {self.steps}; lower train.tokens")
        if x.ndim != 2 or x.shape[1] != self.source.d_in:
            raise TrainingError(f"a batch has shape {list(x.shape)}: expected [batch, {self.source.d_in}]")
        return self.normalisation(x.to(self.device))

    def _step(self, x: Float[Tensor, "batch d_in"]) -> Losses:
        settings = self.settings
        context = Context(
            dead=self.firing.dead,
            dead_candidates=self.firing.candidates,
            l1_coefficient=l1_weight(self.step, self.steps, settings.l1_coefficient, settings.l1_warmup_fraction),
            aux_coefficient=settings.aux_coefficient,
            k_aux=self.k_aux,
            density=self.firing.density,
            encoder_sink=self.optimizer.encoder_sink,
            decoder_sink=self.optimizer.decoder_sink,
            low=self.optimizer.low,
        )
        losses = OBJECTIVES[self.architecture](self.dictionary, x, context)
        losses.total.backward()
        self.optimizer.step(self._rate())
        self.step += 1
        self.firing.record(losses.fired, losses.l0, len(x), self.step)
        if losses.threshold is not None:
            self._learn_threshold(losses.threshold)
        bad = ~losses.total.detach().isfinite()
        self.bad_input |= bad & (self.first_bad_step < 0) & ~x.isfinite().all()
        self.first_bad_step = torch.where(bad & (self.first_bad_step < 0), self.step, self.first_bad_step)
        return losses

    def _rate(self) -> float:
        settings = self.settings
        return learning_rate(self.step, self.steps, self.rate, settings.warmup_fraction, settings.decay_fraction)

    def _learn_threshold(self, smallest: Float[Tensor, ""]) -> None:
        """The mean over the first steps, a running one afterwards: there is a threshold from the first step on."""
        threshold = self.dictionary.get_parameter("threshold")
        threshold += (smallest - threshold) * max(1 / self.step, THRESHOLD_RATE)

    def _metrics(self, meter: Meter) -> dict[str, float | int]:
        return {
            "step": self.step,
            "tokens": self.step * self.source.batch_size,
            **meter.read(),
            "dead": int(self.firing.dead.sum()),
            "lr": self.optimizer.lr,
        }

    def _check_finite(self) -> None:
        step = int(self.first_bad_step)
        if step < 0:
            return
        size = self.source.batch_size
        rows = f"batch {step - 1} (tokens {(step - 1) * size:,} to {step * size:,})"
        cause = "the activations themselves are not finite" if bool(self.bad_input) else "training diverged"
        way_out = (
            "check the cache with 'sae verify'" if bool(self.bad_input) else f"lower train.lr (now {self.rate:.2g})"
        )
        kept = list_checkpoints(self.folder / CHECKPOINTS) if self.folder else []
        last = f"the last good checkpoint is {str(kept[-1])!r}" if kept else "there is no checkpoint yet"
        raise TrainingError(f"NaN at step {step}, {rows}: {cause}; {way_out}; {last}")

    def _checkpoint(self) -> None:
        if self.folder is None:
            return
        self._check_finite()
        state = {
            "identity": self.identity,
            "step": self.step,
            "dictionary": self.dictionary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "firing": self.firing.state_dict(),
            "source": self.source.state_dict(),
            "mean": self.normalisation.mean,
            "scale": self.normalisation.scale,
            "generator": self.generator.get_state(),
        }
        save_checkpoint(self.folder / CHECKPOINTS, self.step, state, self.folded(), self.settings.keep_checkpoints)

    def _resume(self) -> None:
        kept = list_checkpoints(self.folder / CHECKPOINTS) if self.folder else []
        if not kept:
            return
        state = load_checkpoint(kept[-1])
        for key, value in self.identity.items():
            if state["identity"].get(key) != value:
                raise TrainingError(
                    f"checkpoint {str(kept[-1])!r}: made with {key}={state['identity'].get(key)!r}, now {value!r}; "
                    "choose another run folder (out=...), or delete its checkpoints to start anew"
                )
        self.step = state["step"]
        self.dictionary.load_state_dict(state["dictionary"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.firing.load_state_dict(state["firing"])
        self.source.load_state_dict(state["source"])
        self.normalisation = Normalisation(state["mean"].to(self.device), state["scale"])
        self.generator.set_state(state["generator"])

    def _interrupted(self) -> str:
        if self.folder is None:
            return f"stopped at step {self.step} of {self.steps}; without a run folder nothing is kept"
        return (
            f"stopped at step {self.step} of {self.steps}; the state is saved in {str(self.folder / 'checkpoints')!r}: "
            "run the same command again to go on"
        )


def _build(shape: DictionaryConfig, d_in: int) -> Dictionary:
    cls = ARCHITECTURES[shape.architecture]
    return cls(d_in, shape.d_sae, **{name: getattr(shape, name) for name in cls.setting_names})


def chosen_settings(shape: DictionaryConfig, settings: TrainConfig) -> dict[str, Any]:
    """The settings that decide the weights; how often to log and to save is not among them."""
    presentation = {"log_every", "checkpoint_every", "keep_checkpoints"}
    return {**shape.model_dump(exclude={"hook"}), **settings.model_dump(exclude=presentation)}


def _in_bfloat16(settings: TrainConfig, device: torch.device) -> bool:
    """Whether the large product is made in bfloat16: where asked for, and on a GPU unless asked otherwise."""
    if settings.products == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        warnings.warn(
            "train.products=bfloat16: this processor has no bfloat16 instructions, so float32 is faster", stacklevel=2
        )
    return settings.products == "bfloat16" or (settings.products == "auto" and device.type == "cuda")


def _identity(source: BatchSource, shape: DictionaryConfig, settings: TrainConfig, seed: int) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption."""
    return {
        "d_in": source.d_in,
        **chosen_settings(shape, settings),
        "batch_size": source.batch_size,
        "seed": seed,
    }


def _total_tokens(source: BatchSource, settings: TrainConfig) -> int:
    tokens = settings.tokens or source.tokens_per_epoch
    if tokens is None:
        raise ConfigError("train.tokens: the source has no end, so say how many tokens to train on")
    if tokens < source.batch_size:
        raise TrainingError(
            f"{tokens:,} training tokens are fewer than one batch of {source.batch_size:,}: "
            "lower train.batch_size, or harvest more (data.tokens)"
        )
    return tokens


def _normalisation(source: BatchSource, center: bool, device: torch.device) -> Normalisation:
    statistics = source.statistics
    mean = statistics.mean if center else torch.zeros_like(statistics.mean)
    square = statistics.mean_squared_norm - (float(statistics.mean.double().square().sum()) if center else 0.0)
    if not square > 0:
        raise TrainingError(
            f"the activations' mean squared norm is {square}: all are equal or not finite; nothing to learn"
        )
    return Normalisation(mean.to(device), (source.d_in / square) ** 0.5)


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
