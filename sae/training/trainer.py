"""One dictionary in training: weights, optimiser, dead features, sparsity weight, threshold. It writes no files."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.dictionary.frame import PLAIN
from sae.dictionary.neighbours import nearest_neighbours
from sae.errors import TrainingError
from sae.files import version
from sae.kernels import is_replayable, operators_beside
from sae.kernels.interface import DENSE_ABOVE, Room
from sae.numerics.seeding import torch_generator
from sae.training.checkpoint import STATE_VERSION
from sae.training.firing import FiringRecord, default_dead_after
from sae.training.initialise import gain, in_frame, initialise_, take_over_
from sae.training.joined import site_widths_of
from sae.training.normalisation import Normalisation, fold_, normalisations_of, normalised_mean, recorded_scale
from sae.training.objectives import OBJECTIVES, Losses, StepInputs
from sae.training.optimizer import FeatureAdam
from sae.training.outliers import Outliers
from sae.training.precision import in_bfloat16, was_in_bfloat16
from sae.training.recipe import LATER, Recipe, build, freeze_, identity_of, is_same_setting, setting_of
from sae.training.schedules import (
    VERSION_1_GAINS,
    SteeredWeight,
    default_gains,
    default_learning_rate,
    falling_l0,
    learning_rate,
    warmed_up,
)
from sae.training.source import BatchSource
from sae.training.threshold import let_k_fire_, rows_for_threshold

COSINES = 512
"""Number of features whose nearest one is computed for the log; for all, it would take as long as steps."""
_OLD_THRESHOLD_RATE = 0.03
"""Weight of the newest batch in the running mean of version 1."""


class Trainer:
    """State of one dictionary in training.

    Args:
        recipe: the dictionary's recipe.
        input_source: source of its inputs.
        target_source: source of its targets; None: the inputs.
        steps: total number of steps.
        device: where to train.

    Attributes:
        falls: whether the target L0 falls to k from a larger value. The architecture must have `falling_l0`, start from
            random directions, and have a steered penalty and trained biases.
        variance: variance of the last batch's targets, summed over d_out; its FVU is relative to it.
        is_replayable: whether the device's part of a step can be recorded and replayed.
    """

    def __init__(
        self, recipe: Recipe, input_source: BatchSource, target_source: BatchSource | None, steps: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        config, settings = recipe.dictionary, recipe.settings
        self.recipe, self.settings, self.steps, self.step_number = recipe, settings, steps, 0
        self.batch_size, self.version = input_source.batch_size, STATE_VERSION
        d_in, d_out = input_source.d_in, None if target_source is None else target_source.d_in
        self.is_replayable = is_replayable(device, max(d_in, d_out or d_in))
        self.identity = identity_of(recipe, input_source, target_source)
        self.generator = torch_generator(f"initial weights: {recipe.purpose}", recipe.seed)
        self.dictionary = build(config, d_in, d_out, site_widths_of(input_source)).to(device)
        freeze_(self.dictionary, settings.freeze)
        self.rate = settings.lr or default_learning_rate(config.d_sae, steps)
        dead_after = settings.dead_after_tokens or default_dead_after(config.d_sae, config.k, steps * self.batch_size)
        self.normalisation, self.target_normalisation = normalisations_of(
            input_source, target_source, settings.center, device
        )
        sides = ((input_source, self.normalisation), (target_source, self.target_normalisation))
        self.outliers = Outliers(
            settings.max_activation_norm_multiple,
            [normalised_mean(source, normalise) for source, normalise in sides if source and normalise],
            is_replayable=self.is_replayable,
        )
        self.optimizer = FeatureAdam(
            self.dictionary, settings.beta1, settings.beta2, max_norm=settings.max_gradient_norm,
            low_precision=in_bfloat16(self.dictionary, settings.encoder_dtype, device),
            is_replayable=self.is_replayable,
        )  # fmt: skip
        self.firing = FiringRecord(config.d_sae, dead_after, device, is_replayable=self.is_replayable)
        self.steered = None
        if self.dictionary.penalty == "l1" and settings.l1_coefficient is None:
            self.steered = SteeredWeight(config.k, 2.0, device, default_gains(self.rate))
        self.falls = (
            self.steered is not None and self.dictionary.falling_l0
            and recipe.start is None and "b_enc" not in settings.freeze
        )  # fmt: skip
        fraction = settings.sparsity_warmup_fraction
        self.sparsity_warmup = (0.1 if self.falls else 0.05) if fraction is None else fraction
        self.batches_ahead = 0
        if self.dictionary.batch_threshold:
            self.batches_ahead = -(-rows_for_threshold(config.k) // self.batch_size)
        self.newest: Float[Tensor, "batch d_in"] | None = None
        self.variance = torch.ones((), device=device)
        self.warmth: float | Float[Tensor, ""] = 1.0
        self.target_l0: float | Float[Tensor, ""] = float(config.k)
        self.numbers = torch.zeros(2, device=device) if self.is_replayable else None
        self.steps_done = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_input = torch.zeros((), dtype=torch.bool, device=device)

    def step(self, raw: Float[Tensor, "batch d_in"], raw_target: Float[Tensor, "batch d_out"] | None) -> Losses:
        """Take a step on raw activations of any floating-point dtype."""
        self.prepare(raw, raw_target)
        losses = self.compute(raw, raw_target)
        self.finish()
        return losses

    def prepare(self, raw: Float[Tensor, "batch d_in"], raw_target: Float[Tensor, "batch d_out"] | None) -> None:
        """What comes before the device's part of a step: initial weights, and numbers that differ from step to step."""
        if self.step_number == 0:
            factors = self.outliers.rescale(self.outliers.clean(*self._normalised(raw, raw_target)))
            self.normalisation = self.normalisation.times(factors[0])
            if self.target_normalisation is not None:
                self.target_normalisation = self.target_normalisation.times(factors[1])
            first = self.outliers.clean(*self._normalised(raw, raw_target))
            self._begin(first.x, first.target)
        warmup, decay = self.settings.warmup_fraction, self.settings.decay_fraction
        self.optimizer.begin_step(learning_rate(self.step_number, self.steps, self.rate, warmup, decay))
        warmth = 1.0 if self.falls else warmed_up(self.step_number, self.steps, self.sparsity_warmup)
        self.warmth, self.target_l0 = warmth, self._target_l0()
        if self.numbers is not None:
            self.numbers.copy_(torch.tensor([self.warmth, self.target_l0]), non_blocking=True)
            self.warmth, self.target_l0 = self.numbers.unbind()

    def compute(
        self, raw: Float[Tensor, "batch d_in"], raw_target: Float[Tensor, "batch d_out"] | None,
        room: Room | None = None,
    ) -> Losses:  # fmt: skip
        """The device's part of a step. If it is replayable, it reads from the host only what `variant` names."""
        # all that is large is a selection, products with codes, or Adam of the two matrices
        is_sparse = self.dictionary.penalty is None and self.dictionary.W_skip is None
        with operators_beside(self.dictionary.W_dec) if is_sparse else contextlib.nullcontext():
            return self._compute(raw, raw_target, room)

    def _compute(self, raw: Tensor, raw_target: Tensor | None, room: Room | None) -> Losses:
        batch = self.outliers.clean(*self._normalised(raw, raw_target))
        x, target, self.variance = batch.x, batch.target, batch.variance
        context = self._context(room)
        losses = OBJECTIVES[self.dictionary.architecture](self.dictionary, x, target, context)
        losses.total.backward()
        self.optimizer.update()
        self.steps_done += 1
        self.outliers.record(batch)
        self.firing.add(losses.counts, losses.l0, len(x))
        if self.steered is not None:
            self.steered.observe(losses.l0)
        if self.batches_ahead:
            self._keep(x)
        elif losses.threshold is not None:
            self._update_old_threshold(losses.threshold)
        is_first_bad = ~losses.total.detach().isfinite() & (self.first_bad_step < 0)
        if self.is_replayable or x.device.type != "cpu" or bool(is_first_bad):  # on a CPU, asking is cheaper
            self.bad_input |= is_first_bad & ~(x.isfinite().all() & target.isfinite().all())
        self.first_bad_step.copy_(torch.where(is_first_bad, self.steps_done, self.first_bad_step))
        return replace(losses, terms={**losses.terms, **self._also_logged(context)})

    @property
    def variant(self) -> tuple[int | bool, ...]:
        """What decides which operations the device's part of the next step has."""
        return len(self.firing.candidates), self.firing.density > DENSE_ABOVE

    def finish(self) -> None:
        """What comes after the device's part of a step. Waits for the device every sixteen steps."""
        self.step_number += 1
        self.firing.after_step(self.batch_size, self.step_number)

    def folded(self) -> Dictionary:
        """A copy that takes raw activations and has decoder rows of norm 1; its threshold is the one set last."""
        dictionary = copy.deepcopy(self.dictionary).cpu().eval().requires_grad_(False)
        if not dictionary.unit_decoder:
            dictionary.normalise_decoder_()
        fold_(dictionary, self.normalisation, self.target_normalisation)
        dictionary.metadata = {
            **self.recipe.metadata,
            "sae_version": version.__version__,
            "trained": {
                "tokens": self.step_number * self.batch_size,
                "steps": self.step_number,
                "normalisation_scale": recorded_scale(self.normalisation, dictionary.site_widths),
                "dead": int(self.firing.dead.sum()),
                "left_out": int(self.outliers.left_out),
                "dead_after_tokens": self.firing.dead_after,
                "settings": self.identity,
            },
        }
        return dictionary

    def set_threshold_(self, ahead: Sequence[Float[Tensor, "batch d_in"]]) -> None:
        """Set the threshold for the current weights, if training sets one.

        Args:
            ahead: the next `batches_ahead` batches, raw and not trained on yet; if the source has no more, the newest
                batch is used.
        """
        if not self.batches_ahead or self.newest is None:
            return
        rows = self.newest
        if ahead:
            rows = self.outliers.without(self.normalisation(torch.cat(list(ahead[: self.batches_ahead]))))
        let_k_fire_(self.dictionary, rows, self.recipe.dictionary.k)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed training needs in addition to its source's place."""
        return {
            "version": self.version,
            "identity": self.identity,
            "step": self.step_number,
            "dictionary": self.dictionary.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "firing": self.firing.state_dict(),
            "encoder_dtype": "float32" if self.optimizer.encoder_bf16 is None else "bfloat16",
            "rate": self.rate,
            "sparsity_warmup": self.sparsity_warmup,
            "steered": None if self.steered is None else self.steered.state_dict(),
            "normalisations": [
                None if part is None else part.state_dict() for part in (self.normalisation, self.target_normalisation)
            ],
            "outliers": self.outliers.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state of the same recipe, with the defaults that it started with."""
        self.step_number = state["step"]
        self.steps_done.fill_(self.step_number)
        self.dictionary.load_state_dict(state["dictionary"])
        self.optimizer.keep_bfloat16(was_in_bfloat16(self.dictionary, self.settings.encoder_dtype, state))
        self.optimizer.load_state_dict(state["optimizer"])
        self.firing.load_state_dict(state["firing"])
        self.version = state.get("version", 1)
        self.rate = state.get("rate", self.rate)
        self.sparsity_warmup = state.get("sparsity_warmup", self.sparsity_warmup)
        if self.steered is not None:
            self.steered.load_state_dict(state["steered"])
        if self.version < 4 and self.dictionary.frame.d_out is not None:
            self.dictionary.frame = PLAIN  # a transcoder of before subtracts b_dec from what it reads
        if self.version < 2:  # continue by its rules; the checkpoint contains its scale
            self.batches_ahead = 0
            self.is_replayable = self.is_replayable and not self.dictionary.batch_threshold
            if self.steered is not None:
                self.steered.gains = VERSION_1_GAINS
        if self.version < 3:
            self.outliers.multiple = None
            self.identity = {key: value for key, value in self.identity.items() if key not in LATER}
        else:
            self.outliers.load_state_dict(state["outliers"])
        saved, saved_target = state["normalisations"]
        like = self.normalisation.mean
        self.normalisation = Normalisation.from_state(saved, like)
        if saved_target is not None:
            self.target_normalisation = Normalisation.from_state(saved_target, like)
        self.generator.set_state(state["generator"])

    def check_identity(self, identity: dict[str, Any], label: str) -> None:
        """Refuse a state that was made with other settings.

        Raises:
            TrainingError: naming the first setting that differs.
        """
        for key, value in self.identity.items():
            if key == "activations" and identity.get(key) is None:  # sources did not report it to older checkpoints
                continue
            if not is_same_setting(identity, key, value):
                raise TrainingError(
                    f"{label}: made with {key}={setting_of(identity, key)!r}, now {value!r}; choose another run folder "
                    "(out=...), or delete its checkpoints to start again"
                )

    def failure(self) -> str | None:
        """The reason if a loss was not finite, else None. Waits for the device."""
        step = int(self.first_bad_step)
        if step < 0:
            return None
        cause = f"training diverged; lower train.lr (now {self.rate:.2g})"
        if bool(self.bad_input):
            cause = "the activations themselves are not finite; check a cache with 'sae verify'"
        tokens = f"tokens {(step - 1) * self.batch_size:,} to {step * self.batch_size:,}"
        return f"NaN at step {step}, batch {step - 1} ({tokens}): {cause}"

    def feature_metrics(self) -> dict[str, Float[Tensor, " some"]]:
        """Metrics per feature for the log: how often features fire, and how similar they are. Waits for the device.

        Returns:
            `log10_density`: log10 of the share of the tokens since the last call on which a feature fired, for features
            that did; `decoder_cosine`: cosine of a decoder row with its nearest other row, for up to `COSINES`
            features.
        """
        densities = self.firing.take_densities()
        W_dec = self.dictionary.W_dec.detach()
        sample = torch.arange(0, len(W_dec), -(-len(W_dec) // COSINES), device=W_dec.device)
        cosines = nearest_neighbours(W_dec, 1, sample).cosine.flatten()
        return {
            "log10_density": densities[densities > 0].log10().cpu(),
            "decoder_cosine": cosines[cosines.isfinite()],
        }

    def metrics_now(self) -> dict[str, float | int]:
        """Metrics of the current step, not averaged, in units of training. Waits for the device."""
        metrics: dict[str, float | int] = {
            "dead": int(self.firing.dead.sum()), "left_out": int(self.outliers.left_out), "lr": self.optimizer.lr,
        }  # fmt: skip
        if self.dictionary.batch_threshold:
            metrics["threshold"] = float(self.dictionary.get_parameter("threshold"))
        return metrics

    def bytes(self) -> int:
        """Memory of the weights and of the optimiser's state."""
        return self.optimizer.bytes() + sum(t.numel() * t.element_size() for t in self.dictionary.parameters())

    def _begin(self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"]) -> None:
        """Set the initial weights, from the first batch."""
        l0, start = round(self._target_l0()), self.recipe.start
        if start is None:
            initialise_(self.dictionary, x, self.generator, target, l0, self.settings.initial_b_dec)
        else:
            start = in_frame(start, self.dictionary.frame, like=x)
            inverse_target = None if self.target_normalisation is None else self.target_normalisation.inverse()
            fold_(start, self.normalisation.inverse(), inverse_target)
            take_over_(self.dictionary, start, x, l0)
        if self.steered is not None:
            self.steered.begin(self.dictionary.b_enc, gain(self.dictionary, x, target))
        self.firing.density = l0 / self.dictionary.d_sae  # an estimate, until features are counted
        self.optimizer.refresh()

    def _normalised(
        self, raw: Float[Tensor, "batch d_in"], raw_target: Float[Tensor, "batch d_out"] | None
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """Input and target of a step, in float32."""
        x = self.normalisation(raw)
        if raw_target is None or self.target_normalisation is None:
            return x, x
        return x, self.target_normalisation(raw_target)

    def _context(self, room: Room | None = None) -> StepInputs:
        settings, k, penalty = self.settings, self.recipe.dictionary.k, self.dictionary.penalty
        aims_at_k = penalty == "l0" and settings.l0_coefficient is None
        weight: float | Float[Tensor, ""]
        if self.steered is not None:
            self.steered.target = self.target_l0
            weight = self.steered.value
        elif aims_at_k:
            weight = float(self.dictionary.d_out)
        else:
            weight = (settings.l0_coefficient if penalty == "l0" else settings.l1_coefficient) or 0.0
        return StepInputs(
            dead=self.firing.dead,
            dead_candidates=self.firing.candidates,
            sparsity=self.warmth * weight,
            aux_coefficient=settings.aux_coefficient,
            k_aux=settings.k_aux or k,
            density=self.firing.density,
            encoder_sink=self.optimizer.encoder_sink,
            decoder_sink=self.optimizer.decoder_sink,
            encoder_bf16=self.optimizer.encoder_bf16,
            target_l0=k if aims_at_k else None,
            bandwidth=settings.bandwidth,
            room=room,
        )

    def _keep(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Keep the newest batch; if steps are replayable, always in the same place."""
        if self.is_replayable and self.newest is not None:
            self.newest.copy_(x)
        else:
            self.newest = x

    def _target_l0(self) -> float:
        """Target L0 at this step."""
        k, d_sae = self.recipe.dictionary.k, self.dictionary.d_sae
        return falling_l0(self.step_number, self.steps, k, d_sae, self.sparsity_warmup) if self.falls else float(k)

    def _also_logged(self, context: StepInputs) -> dict[str, Float[Tensor, ""]]:
        """Metrics to log along with the terms of the loss."""
        shown = {"gradient_norm": self.optimizer.norm}
        if self.dictionary.penalty is not None:
            shown["sparsity_weight"] = torch.as_tensor(context.sparsity)
        return {name: value for name, value in shown.items() if value is not None}

    def _update_old_threshold(self, smallest: Float[Tensor, ""]) -> None:
        """Threshold of version 1: a mean over the first steps, then a running mean."""
        threshold = self.dictionary.get_parameter("threshold")
        threshold += (smallest - threshold) * max(1 / (self.step_number + 1), _OLD_THRESHOLD_RATE)
