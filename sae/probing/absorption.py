"""Feature splitting and absorption: does a concept's latent stay silent where another latent has absorbed it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.frame import PLAIN
from sae.errors import ShapeError
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import numpy_generator
from sae.probing.activations import LabelledActivations
from sae.probing.linear import Design, LinearProbe, rank_columns, require_sklearn
from sae.probing.scores import binary_scores, mean_and_error
from sae.probing.settings import LetterConfig
from sae.probing.splits import Split, check_split, split_examples
from sae.results.estimate import Estimate, ratio

SILENT = 1e-8


@runtime_checkable
class Decoding(Protocol):
    """A dictionary with decoder directions: `W_dec [d_sae, d_in]` and `b_dec [d_in]`."""

    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802

    @property
    def b_dec(self) -> Tensor: ...

    def encode(self, x: Tensor, /) -> Tensor:
        """`[batch, d_in]` → `[batch, d_sae]`."""
        ...


@dataclass(frozen=True)
class ConceptResult:
    """Result for one class against the rest.

    Attributes:
        name: name of the class.
        examples: number of its examples, in all parts.
        dense_f1: F1 of the dense probe on the validation examples; it decides whether the concept is measured.
        able: whether the concept is measured.
        main: the latents that the concept is split into, best ranked first; more than one means feature splitting.
        f1_by_k: validation F1 of probes on the best 1, 2, … latents, up to the last k tried.
        test_f1: test F1 of the dense probe and of the probe on the main latents.
        positives: test examples of the class that the dense probe detects, as rows of the activations.
        silent: the positives on which no main latent fires.
        absorbed: those of `silent` on which another latent carries the projection.
        absorbing: pairs of absorbing latent and number of examples, most frequent first.
    """

    name: str
    examples: int
    dense_f1: float
    able: bool
    main: tuple[int, ...]
    f1_by_k: tuple[float, ...]
    test_f1: tuple[Estimate, Estimate]
    positives: tuple[int, ...]
    silent: tuple[int, ...]
    absorbed: tuple[int, ...]
    absorbing: tuple[tuple[int, int], ...]

    @property
    def rate(self) -> Estimate:
        """Absorption rate: the absorbed share of the positives, with its standard error over positives."""
        return _share(self.absorbed, self.positives)

    @property
    def silent_rate(self) -> Estimate:
        """Share of the positives on which no main latent fires: an upper bound on the absorption rate."""
        return _share(self.silent, self.positives)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "examples": self.examples,
            "able": self.able,
            "dense_f1_validation": self.dense_f1,
            "dense_f1": self.test_f1[0].to_json(),
            "main_latents": list(self.main),
            "main_f1": self.test_f1[1].to_json(),
            "f1_by_k_validation": list(self.f1_by_k),
            "positives": len(self.positives),
            "silent": len(self.silent),
            "absorbed": len(self.absorbed),
            "silent_rate": self.silent_rate.to_json(),
            "absorption_rate": self.rate.to_json(),
            "absorbing_latents": [{"latent": latent, "examples": count} for latent, count in self.absorbing],
        }


@dataclass(frozen=True)
class AbsorptionResult:
    """Results for all concepts.

    Attributes:
        concepts: results in order of their names.
    """

    concepts: tuple[ConceptResult, ...]

    @property
    def able(self) -> tuple[ConceptResult, ...]:
        """The concepts whose dense probe is good enough."""
        return tuple(concept for concept in self.concepts if concept.able)

    def mean(self, name: str) -> tuple[float, float | None] | None:
        """Mean of `rate`, `silent_rate` or `splits` over the able concepts, and its standard error over concepts."""
        values = [_value(concept, name) for concept in self.able]
        numbers = [value for value in values if value is not None]
        return mean_and_error(numbers) if numbers else None


@in_own_modes
def measure_absorption(
    dictionary: Decoding, data: LabelledActivations, settings: LetterConfig | None = None, name: str = "labels"
) -> AbsorptionResult:
    """Measure splitting and absorption of each class against the rest (Chanin et al. 2024, "A is for absorption").

    Examples are split into training, validation and test examples. For each class:

    1. A dense probe is fitted to the activations, with both classes weighted equally. If its validation F1 is below
       `able_f1`, the model does not represent the concept at this place, and it is not measured.
    2. Probes are fitted on the k latents that are most informative about the class (largest positive difference of
       training means in standard deviations: the correlation with the label). k grows from 1 as long as another latent
       raises validation F1 by more than `split_gain`. The latents of the last such probe are the main latents S.
    3. Consider the test examples of the class that the dense probe, with unit direction p, detects. An example is
       absorbed if all of S are silent and the latent j with the largest projection f_j (W_dec,j · p) has
       cos(W_dec,j, p) ≥ `cosine` and carries at least `share` of (x − b_dec) · p > 0.

    The absorption rate is absorbed / detected by the dense probe. Thresholds are those of SAEBench's "full absorption"
    (0.025 and 0.4; split gain 0.03; F1 0.6), which replaces the paper's ablation effects with projections. SAEBench
    finds S by an L1 probe and the split by test F1, and takes the share of x · p.

    Args:
        dictionary: has `encode`, `W_dec` and `b_dec`.
        data: activations, one row per example.
        settings: thresholds, shares of the parts, seed.
        name: name of the labels, for messages.

    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: a class has too few examples.
        ShapeError: decoder rows and activations differ in width.
    """
    require_sklearn()
    settings = settings or LetterConfig()
    if dictionary.W_dec.shape[-1] != data.rows.shape[-1]:
        raise ShapeError(
            f"W_dec of shape {list(dictionary.W_dec.shape)}: the activations have {data.rows.shape[-1]} numbers, so "
            f"[d_sae, {data.rows.shape[-1]}] was expected"
        )
    split = split_examples(
        data.labels, data.groups.numpy(), rng=numpy_generator("first letters: split", settings.seed),
        test_fraction=settings.test_fraction, validation_fraction=settings.validation_fraction,
    )  # fmt: skip
    concepts = _Concepts(dictionary, data, split, settings)
    labels = np.array(data.labels)
    results = []
    for label in sorted(set(data.labels)):
        check_split(split, labels == label, f"{name} {label!r}")
        results.append(concepts.measure(label, labels == label))
    return AbsorptionResult(tuple(results))


class _Concepts:
    """Activations, latents and directions, from which one class after another is measured."""

    def __init__(self, dictionary: Decoding, data: LabelledActivations, split: Split, settings: LetterConfig) -> None:
        self.split, self.settings, self.groups = split, settings, data.groups.numpy()
        self.dense, self.latents = data.dense().numpy(), data.latents(dictionary).numpy()
        self.design = Design(self.dense, split)
        self.directions = dictionary.W_dec.detach().double().cpu().numpy()
        self.offset = dictionary.b_dec.detach().double().cpu().numpy()
        frame = getattr(dictionary, "frame", PLAIN)
        self.normalised = self.dense if frame == PLAIN else frame.normalised(data.dense()).numpy()

    def measure(self, name: str, truth: Bool[np.ndarray, " rows"]) -> ConceptResult:
        """Measure a class: dense probe, main latents, and test examples where those are silent and another is not."""
        dense_probe = self.design.fit(truth, balanced=True, refit=False)
        decisions = dense_probe.decisions(self.dense)
        dense_f1 = _f1(truth, decisions, self.split.validation)
        main, f1_by_k, sparse_probe = _main_latents(self.latents, truth, self.split, self.settings)
        test = self.split.test
        able = dense_f1 >= self.settings.able_f1
        positives = test[truth[test] & (decisions[test] > 0)] if able else test[:0]
        silent = positives[(self.latents[positives][:, main] <= SILENT).all(1)]
        carriers = self._carriers(silent, dense_probe.weights / np.linalg.norm(dense_probe.weights), main)
        numbers, counts = np.unique(carriers[carriers >= 0], return_counts=True)
        absorbing = sorted(zip(numbers.tolist(), counts.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
        sparse_decisions = sparse_probe.decisions(self.latents[:, main])
        f1s = [
            binary_scores(truth[test], log_odds[test], self.groups[test]).f1
            for log_odds in (decisions, sparse_decisions)
        ]
        return ConceptResult(
            name, int(truth.sum()), dense_f1, able, tuple(main), tuple(f1_by_k), (f1s[0], f1s[1]),
            tuple(positives.tolist()), tuple(silent.tolist()), tuple(silent[carriers >= 0].tolist()), tuple(absorbing),
        )  # fmt: skip

    def _carriers(
        self, rows: Int[np.ndarray, " silent"], p: Float[np.ndarray, " d_in"], main: Sequence[int]
    ) -> Int[np.ndarray, " silent"]:
        """The latent that absorbs the concept in each row, −1 if none does."""
        along = self.directions @ p
        norms = np.linalg.norm(self.directions, axis=1)
        cosines = np.divide(along, norms, out=np.zeros_like(along), where=norms > 0)
        carried = self.latents[rows] * along
        carried[:, main] = -np.inf
        best = carried.argmax(1)
        amount = carried[np.arange(len(rows)), best]
        projection = (self.normalised[rows] - self.offset) @ p
        fits = cosines[best] >= self.settings.cosine
        fits &= (projection > 0) & (amount >= self.settings.share * projection)
        return np.where(fits, best, -1)


def _main_latents(
    latents: Float[np.ndarray, "rows d_sae"], truth: Bool[np.ndarray, " rows"], split: Split, settings: LetterConfig
) -> tuple[list[int], list[float], LinearProbe]:
    """The latents that a concept is split into, F1 for each k tried, and the probe on these latents."""
    ranked = rank_columns(latents[split.train], truth[split.train], "standardised", signed=True).tolist()
    probes: list[LinearProbe] = []
    scores: list[float] = []
    for k in range(1, min(settings.max_splits, len(ranked)) + 1):
        probe = Design(latents[:, ranked[:k]], split).fit(truth, balanced=True, refit=False)
        score = _f1(truth, probe.decisions(latents[:, ranked[:k]]), split.validation)
        better = not scores or score > scores[-1] + settings.split_gain
        scores.append(score)
        if not better:
            break
        probes.append(probe)
    return ranked[: len(probes)], scores, probes[-1]


def _f1(truth: np.ndarray, decisions: np.ndarray, rows: np.ndarray) -> float:
    predicted = decisions[rows] > 0
    total = truth[rows].sum() + predicted.sum()
    return float(2 * (truth[rows] & predicted).sum() / total) if total else 0.0


def _share(part: Sequence[int], rows: Sequence[int]) -> Estimate:
    members = set(part)
    inside = torch.tensor([row in members for row in rows], dtype=torch.float64)
    return ratio(inside, torch.ones(len(rows), dtype=torch.float64))


def _value(concept: ConceptResult, name: str) -> float | None:
    if name == "splits":
        return float(len(concept.main))
    return {"rate": concept.rate, "silent_rate": concept.silent_rate}[name].value
