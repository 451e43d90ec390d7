"""Synthetic activations of known features: random directions, present with known frequencies, in batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.errors import ConfigError, TrainingError
from sae.evaluation.recovery import Labelled
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import STREAMS, numpy_generator, torch_generator
from sae.numerics.statistics import Statistics
from sae.superposition.geometry import REPRESENTED
from sae.superposition.toy import train_toy_models

_ALWAYS, _NO_PARENT = 0, -1
_STATISTICS_BATCHES = 8
_EVEN, _HARD, _TOY = "even world", "hard world", "toy world"
TRAINING, STATISTICS, VALIDATION, TEST = "training", "statistics", "validation", "test"
"""Random streams of samples; no two share a sample."""


@dataclass(frozen=True)
class Sample:
    """Activations, and the features they are made of.

    Attributes:
        activations: values @ directions.
        values: magnitude of each feature, 0 if it is absent.
    """

    activations: Float[Tensor, "batch d_in"]
    values: Float[Tensor, "batch features"]

    def labelled(self) -> Labelled:
        """The activations, and which features are present."""
        return Labelled(self.activations, self.values > 0)


@dataclass(frozen=True)
class SyntheticFeatures:
    """x = Σ_i v_i d_i, where feature i is present with probability `frequency[i]`, and then v_i ~ U[0, 1].

    A feature is present if its gate is open, its parent (if it has one) is present, and its own coin, with probability
    `chance`, says so. Features that share a gate occur together; a child occurs only with its parent. Everything else
    is independent, so every frequency and every joint frequency is known in closed form.

    Attributes:
        directions: d_i; unit vectors, except a toy model's.
        frequency: probability that a feature is present; their sum is the mean L0.
        chance: the same, given an open gate and a present parent.
        gate: index into `gates` of each feature; gate 0 is always open.
        gates: probability that each gate is open.
        parent: index of each feature's parent; −1: none. Parents have no parents.
        seed: determines all samples, along with the batch number.
        name: kind of features; two kinds share no random stream, whatever their seeds.
    """

    directions: Float[Tensor, "features d_in"]
    frequency: Float[Tensor, " features"]
    chance: Float[Tensor, " features"]
    gate: Int[Tensor, " features"]
    gates: Float[Tensor, " gates"]
    parent: Int[Tensor, " features"]
    seed: int = 0
    name: str = "world"

    @property
    def mean_l0(self) -> float:
        """Mean number of features present."""
        return float(self.frequency.double().sum())

    @in_own_modes
    def sample(self, rows: int, number: int = 0, stream: str = TRAINING) -> Sample:
        """A batch, determined by seed, stream, number and rows, whatever was drawn before.

        Args:
            rows: number of rows.
            number: index of the batch in its stream.
            stream: `TRAINING`, `STATISTICS`, `VALIDATION` or `TEST`.
        """
        generator = torch_generator(f"{self.name}: {stream}", self.seed, number)
        features = len(self.frequency)
        coins = torch.rand(rows, features, generator=generator)
        present = coins < self.chance
        gated = (self.gate != _ALWAYS).nonzero().flatten()
        if len(gated):
            open_gates = torch.rand(rows, len(self.gates), generator=generator) < self.gates
            present[:, gated] &= open_gates[:, self.gate[gated]]
        children = (self.parent != _NO_PARENT).nonzero().flatten()
        if len(children):
            present[:, children] &= present[:, self.parent[children]]
        values = torch.where(present, coins / self.chance, 0.0)  # a coin below its chance, divided by it, is uniform
        return Sample(values @ self.directions, values)

    @in_own_modes
    def joint_frequency(self) -> Float[Tensor, "features features"]:
        """Probability that both of two features are present, in float64; on the diagonal, a feature's own frequency.

        Without a common cause, it is p_i p_j. Features behind one gate of probability g share it: p_i p_j / g. A child
        with its parent has its own frequency, and with another child of probability p_j of the same parent,
        p_i p_j / p_parent.
        """
        p = self.frequency.double()
        joint = torch.outer(p, p)
        same_gate = (self.gate[:, None] == self.gate) & (self.gate != _ALWAYS)
        joint = torch.where(same_gate, joint / self.gates.double()[self.gate], joint)
        children = self.parent != _NO_PARENT
        siblings = (self.parent[:, None] == self.parent) & children
        joint = torch.where(siblings, joint / p[self.parent.clamp_min(0)], joint)
        index = torch.arange(len(p))
        joint[index[children], self.parent[children]] = p[children]
        joint[self.parent[children], index[children]] = p[children]
        joint[index, index] = p
        return joint


class SyntheticSource:
    """An endless source of training batches for `sae.train`.

    Batch n does not depend on earlier batches, so training resumes without drawing them again. The statistics come from
    a few batches of another stream.

    Args:
        features: the features to sample.
        batch_size: rows per batch.
    """

    tokens_per_epoch: int | None = None

    def __init__(self, features: SyntheticFeatures, batch_size: int = 2048) -> None:
        self.features, self.batch_size, self.d_in = features, batch_size, features.directions.shape[1]
        parts = [features.sample(batch_size, number, STATISTICS).activations for number in range(_STATISTICS_BATCHES)]
        self.statistics = Statistics.of(torch.cat(parts))
        self._next = 0

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        while True:
            number, self._next = self._next, self._next + 1
            yield self.features.sample(self.batch_size, number).activations

    def state_dict(self) -> dict[str, int]:
        """The number of the next batch, and the version of the random streams."""
        return {"next": self._next, "streams": STREAMS}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a batch.

        Raises:
            TrainingError: earlier batches came from another version of the random streams, with other directions.
        """
        if (streams := state.get("streams", 1)) != STREAMS:
            raise TrainingError(
                f"this training began on samples of version {streams} of the random streams, and the directions are "
                f"different in version {STREAMS}: finish it with the version of sae that began it, or start again"
            )
        self._next = state["next"]

    def restart(self) -> None:
        """Return to the first batch."""
        self._next = 0


@in_own_modes
def even_features(features: int = 512, d_in: int = 256, mean_l0: float = 8.0, *, seed: int = 0) -> SyntheticFeatures:
    """Independent features of equal frequency, mean_l0 / features.

    Raises:
        ConfigError: `mean_l0` is not above 0 and at most the number of features.
    """
    if not 0 < mean_l0 <= features:
        raise ConfigError(
            f"mean_l0={mean_l0:g}: expected a number above 0 and up to the number of features, {features}"
        )
    frequency = torch.full((features,), mean_l0 / features)
    return SyntheticFeatures(
        directions=random_directions(features, d_in, seed, _EVEN),
        frequency=frequency,
        chance=frequency,
        gate=torch.zeros(features, dtype=torch.int64),
        gates=torch.ones(1),
        parent=torch.full((features,), _NO_PARENT),
        seed=seed,
        name=_EVEN,
    )


@in_own_modes
def uneven_features(
    features: int = 512,
    d_in: int = 256,
    mean_l0: float = 8.0,
    *,
    exponent: float = 1.0,
    most_frequent: float = 0.3,
    families: int = 24,
    children: int = 4,
    groups: int = 16,
    group_size: int = 8,
    seed: int = 0,
) -> SyntheticFeatures:
    """Zipf frequencies, families of a parent and children, groups that occur together, and independent features.

    Frequencies fall with a feature's rank to the power of `exponent`, bounded by `most_frequent`, and sum to
    `mean_l0`; feature 0 is the most frequent. Which features belong to families and groups is drawn at random.

    A family's parent is more frequent than its children: the most frequent of all features in families are the parents,
    and the next most frequent are the children of the most frequent parent. A group's members have neighbouring
    frequencies; its gate is open twice as often as its most frequent member is present.

    Args:
        features: number of features.
        d_in: dimensions.
        mean_l0: mean number of features present, exactly.
        exponent: of Zipf's law; 0: all equally frequent.
        most_frequent: upper bound on frequencies.
        families, children: number of families, and of children in each.
        groups, group_size: number of groups, and of members in each.
        seed: of directions, layout and samples.

    Raises:
        ConfigError: families and groups need more features than there are, or frequencies cannot sum to mean_l0.
    """
    family_sum, group_sum = families * (1 + children), groups * group_size
    if family_sum + group_sum > features:
        raise ConfigError(
            f"{families} families of {1 + children} and {groups} groups of {group_size} need {family_sum + group_sum} "
            f"features, and there are {features}: take fewer of them"
        )
    frequency = zipf_frequencies(features, mean_l0, exponent, most_frequent)
    order = numpy_generator(f"{_HARD}: layout", seed).permutation(features)
    chance, gate = frequency.clone(), torch.zeros(features, dtype=torch.int64)
    parent = torch.full((features,), _NO_PARENT)
    in_families = torch.from_numpy(np.sort(order[:family_sum]))
    parents, others = in_families[:families], in_families[families:]
    parent[others] = parents.repeat_interleave(children)
    chance[others] = frequency[others] / frequency[parent[others]]
    in_groups = torch.from_numpy(np.sort(order[family_sum : family_sum + group_sum])).reshape(groups, group_size)
    gates = torch.cat([torch.ones(1), (2 * frequency[in_groups[:, 0]]).clamp_max(1.0)])
    gate[in_groups] = torch.arange(1, groups + 1)[:, None]
    chance[in_groups] = frequency[in_groups] / gates[1:, None]
    directions = random_directions(features, d_in, seed, _HARD)
    return SyntheticFeatures(directions, frequency, chance, gate, gates, parent, seed, _HARD)


@in_own_modes
def toy_features(features: int = 64, hidden: int = 16, mean_l0: float = 1.0, *, seed: int = 0) -> SyntheticFeatures:
    """Features as a toy model, trained here, lays them out in its hidden activations.

    All features are equally important, each present with probability mean_l0 / features. Those that the model has not
    learned (norm at most ½) are left out, as its hidden space lacks them.

    Raises:
        ConfigError: `mean_l0` is not above 0 and at most the number of features, or there is no hidden dimension.
    """
    even = even_features(features, max(hidden, 1), mean_l0, seed=seed)
    models = train_toy_models(even.frequency[:1], torch.ones(1, features), hidden, seed=seed)
    learned = models.W[0].norm(dim=1) > REPRESENTED
    return SyntheticFeatures(
        models.W[0][learned], even.frequency[learned], even.chance[learned], even.gate[learned], even.gates,
        even.parent[learned], seed, _TOY,
    )  # fmt: skip


def zipf_frequencies(
    features: int, mean_l0: float, exponent: float, most_frequent: float
) -> Float[Tensor, " features"]:
    """min(C · rank^−exponent, most_frequent), with C such that the frequencies sum to mean_l0.

    Raises:
        ConfigError: the sum is out of reach even if all are as frequent as allowed, or the bound is no probability.
    """
    if not 0 < most_frequent <= 1:
        raise ConfigError(f"most_frequent={most_frequent:g}: expected a probability above 0 and up to 1")
    if not 0 < mean_l0 < features * most_frequent:
        raise ConfigError(
            f"mean_l0={mean_l0:g}: expected a number above 0 and below {features} features times most_frequent, "
            f"{features * most_frequent:g}"
        )
    weights = np.arange(1, features + 1, dtype=np.float64) ** -exponent
    low, high = 0.0, most_frequent / weights[-1]
    for _ in range(200):
        middle = (low + high) / 2
        if np.minimum(middle * weights, most_frequent).sum() < mean_l0:
            low = middle
        else:
            high = middle
    return torch.from_numpy(np.minimum(high * weights, most_frequent)).float()


def random_directions(features: int, d_in: int, seed: int, kind: str) -> Float[Tensor, "features d_in"]:
    """Independent directions, uniform on the sphere, from the random stream of this kind of features."""
    directions = torch.randn(features, d_in, generator=torch_generator(f"{kind}: directions", seed))
    return torch.nn.functional.normalize(directions, dim=1)
