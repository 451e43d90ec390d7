"""ReLU-output toy models of superposition, many of them trained at once in one tensor program."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae.config.progress import StageProgress, silent
from sae.errors import ConfigError, TrainingError
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import torch_generator
from sae.training.schedules import learning_rate

EXACT_UP_TO = 10
"""Largest number of features n for which the expected loss is summed over all 2ⁿ patterns of presence."""
_VALUES_AT_ONCE = 1 << 20
_REPORT_EVERY = 50


@dataclass(frozen=True)
class ToyTraining:
    """How toy models are trained.

    Attributes:
        steps: number of Adam steps.
        batch_size: fresh inputs per step and model.
        lr: peak learning rate; it rises over the first 2 % of the steps and falls to 0 over the last `decay`.
        decay: share of the steps over which the learning rate falls.
        scale: standard deviation of an initial weight is scale · √(2 / (features + hidden)); 1 is Glorot and Bengio's
            normal initialisation, which Elhage et al. 2022 use.
    """

    steps: int = 3000
    batch_size: int = 512
    lr: float = 1e-2
    decay: float = 0.6
    scale: float = 1.0


@dataclass(frozen=True)
class ToyModels:
    """x' = ReLU(W Wᵀ x + b), one model per instance.   Elhage et al. 2022, "Toy Models of Superposition".

    Row i of W is the direction of feature i in the hidden space (the paper's W is the transpose).

    Attributes:
        W: directions.
        b: output biases.
        density: probability p = 1 − S that a feature is present, one per instance.
        importance: weight I_i of each feature in the loss.
    """

    W: Float[Tensor, "instances features hidden"]
    b: Float[Tensor, "instances features"]
    density: Float[Tensor, " instances"]
    importance: Float[Tensor, "instances features"]

    def hidden(self, x: Float[Tensor, "instances batch features"]) -> Float[Tensor, "instances batch hidden"]:
        """x W: the activations in which features are in superposition."""
        return x @ self.W

    def reconstruct(self, x: Float[Tensor, "instances batch features"]) -> Float[Tensor, "instances batch features"]:
        """ReLU(W Wᵀ x + b)."""
        return (self.hidden(x) @ self.W.mT + self.b[:, None]).relu()

    def select(self, chosen: Tensor) -> ToyModels:
        """Some of the instances, by index or mask."""
        return ToyModels(self.W[chosen], self.b[chosen], self.density[chosen], self.importance[chosen])


def sample_inputs(
    density: Float[Tensor, " instances"], features: int, batch_size: int, generator: torch.Generator
) -> Float[Tensor, "instances features batch"]:
    """x_i ~ U[0, 1] with probability p, else 0, independently.

    One uniform number u decides both: if u < p, the feature is present, and u / p is then uniform.
    """
    p = density[:, None, None]
    u = torch.rand(len(density), features, batch_size, generator=generator)
    return torch.where(u < p, u / p, 0.0)


@torch.inference_mode(False)
@torch.no_grad()
@in_own_modes
def train_toy_models(
    density: Float[Tensor, " instances"],
    importance: Float[Tensor, "instances features"],
    hidden: int,
    training: ToyTraining | None = None,
    *,
    seed: int = 0,
    progress: StageProgress | None = None,
) -> ToyModels:
    """Train one model per instance, each on its own inputs, to minimise E Σ_i I_i (x_i − x'_i)².

    Everything random follows from the seed, so the same call gives the same weights. Adam treats each weight
    separately, so no instance affects another.

    Args:
        density: p of each instance, in (0, 1].
        importance: I_i ≥ 0 of each feature of each instance; its width is the number of features.
        hidden: dimensions m of the hidden space.
        training: how the models are trained.
        seed: of initialisation and inputs.
        progress: called from time to time with (inputs seen by all models together, total).

    Raises:
        ConfigError: a density is not a probability, an importance is below 0, or there is no hidden dimension.
        TrainingError: a weight is not finite.
    """
    training, progress = training or ToyTraining(), progress or silent
    _check(density, importance, hidden)
    instances, features = importance.shape
    deviation = training.scale * (2 / (features + hidden)) ** 0.5
    W = deviation * torch.randn(
        instances, features, hidden, generator=torch_generator("toy models: initial weights", seed)
    )
    inputs = torch_generator("toy models: inputs", seed)
    b = torch.zeros(instances, features)
    optimiser = torch.optim.Adam([W, b])
    total = training.steps * training.batch_size * instances
    progress(0, total)
    for step in range(training.steps):
        x = sample_inputs(density, features, training.batch_size, inputs)
        W.grad, b.grad = loss_gradients(W, b, x, importance)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, training.steps, training.lr, 0.02, training.decay)
        optimiser.step()
        if (step + 1) % _REPORT_EVERY == 0 or step + 1 == training.steps:
            progress((step + 1) * training.batch_size * instances, total)
    if not (W.isfinite().all() and b.isfinite().all()):
        raise TrainingError(f"toy models diverged at lr={training.lr}: lower it")
    return ToyModels(W.detach(), b.detach(), density, importance)


def loss_gradients(
    W: Float[Tensor, "instances features hidden"],
    b: Float[Tensor, "instances features"],
    x: Float[Tensor, "instances features batch"],
    importance: Float[Tensor, "instances features"],
) -> tuple[Float[Tensor, "instances features hidden"], Float[Tensor, "instances features"]]:
    """Gradients of the batch's mean loss with respect to W and b. With z = W h + b and h = Wᵀ x,

    ∂L/∂z_i = 2 I_i (ReLU(z_i) − x_i) [z_i > 0] / batch =: δ_i,  ∂L/∂W = δ hᵀ + x (Wᵀ δ)ᵀ,  ∂L/∂b = Σ δ.

    Inputs are laid out by feature, so that every operation runs along the batch.
    """
    h = W.mT @ x
    z = torch.baddbmm(b[:, :, None], W, h)
    weight = importance[:, :, None] * (2 / x.shape[2])
    delta = torch.where(z > 0, (z - x) * weight, 0.0)
    return delta @ h.mT + x @ (W.mT @ delta).mT, delta.sum(2)


@in_own_modes
def expected_loss(models: ToyModels, points: int = 2048) -> Float[Tensor, " instances"]:
    """E Σ_i I_i (x_i − x'_i)² of each instance, in float64, without noise from which features are present.

    The 2ⁿ patterns of present features are summed with their probabilities p^present (1 − p)^absent; within a pattern,
    magnitudes are the first `points` of a Sobol' sequence, the same for all patterns.

    Raises:
        ConfigError: there are more than `EXACT_UP_TO` features.
    """
    features = models.W.shape[1]
    if features > EXACT_UP_TO:
        raise ConfigError(
            f"{features} features: their {2**features:,} patterns are too many to sum over; expected at most "
            f"{EXACT_UP_TO}"
        )
    magnitudes = torch.quasirandom.SobolEngine(features).draw(points, dtype=torch.float64) + 0.5 / points
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=features)), dtype=torch.float64)
    present = patterns.sum(1)
    losses = torch.zeros(len(models.W), dtype=torch.float64)
    block = max(1, _VALUES_AT_ONCE // (points * features))
    for chosen in torch.arange(len(models.W)).split(block):
        part = models.select(chosen)
        double = ToyModels(part.W.double(), part.b.double(), part.density.double(), part.importance.double())
        p = double.density[:, None]
        weights = p**present * (1 - p) ** (features - present)
        for number, pattern in enumerate(patterns):
            x = (magnitudes * pattern).expand(len(chosen), -1, -1)
            error = (x - double.reconstruct(x)).square().mean(1)
            losses[chosen] += weights[:, number] * (double.importance * error).sum(1)
    return losses


@in_own_modes
def best_of_restarts(models: ToyModels, restarts: int) -> tuple[ToyModels, Float[Tensor, " cells"]]:
    """The instance with the lowest expected loss among every `restarts` consecutive ones, and that loss."""
    losses = expected_loss(models).reshape(-1, restarts)
    lowest = losses.min(1)
    return models.select(torch.arange(len(losses)) * restarts + lowest.indices), lowest.values


def _check(density: Tensor, importance: Tensor, hidden: int) -> None:
    wrong = density[~((density > 0) & (density <= 1))]
    if len(wrong):
        raise ConfigError(f"density {float(wrong[0]):g}: expected a probability above 0 and up to 1")
    if not bool((importance >= 0).all()):
        raise ConfigError(f"importance {float(importance.min()):g}: expected numbers of 0 or more")
    if len(importance) != len(density):
        raise ConfigError(f"{len(density)} densities and {len(importance)} rows of importance: give one for each model")
    if hidden < 1:
        raise ConfigError(f"hidden={hidden}: expected at least one dimension")
