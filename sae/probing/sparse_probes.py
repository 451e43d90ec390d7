"""Fit and score probes on labelled activations: sparse probes on latents and neurons, dense probes, and nulls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.errors import DataError, ShapeError
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import numpy_generator
from sae.probing.activations import Encoder, LabelledActivations
from sae.probing.examples import check_classes
from sae.probing.labels import class_names, is_missing, other_kind
from sae.probing.linear import Design, principal_components, rank_columns, require_sklearn
from sae.probing.scores import BinaryScores, SplitScores, binary_scores, majority_scores, over_classes, over_splits
from sae.probing.settings import ProbeConfig
from sae.probing.splits import LEAST_PER_PART, Split, check_split, split_examples

LATENTS, NEURONS, COMPONENTS, MAJORITY = "latents", "neurons", "components", "majority"
_KEPT_COLUMNS = 64


@dataclass(frozen=True)
class MethodResult:
    """One kind of probe, averaged over splits and, if there are more than two classes, over classes (one vs. rest).

    Attributes:
        scores: scores on the test examples.
        shuffled: scores of the same probe when chosen, fitted and scored with labels shuffled within each part; None
            for the majority null.
        columns: the latents or neurons used for each class and split, best ranked first; empty if all are used.
        strengths: the chosen C of scikit-learn for each class and split.
    """

    scores: SplitScores
    shuffled: SplitScores | None
    columns: dict[str, list[list[int]]]
    strengths: dict[str, list[float]]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.scores.to_json(),
            "shuffled": self.shuffled.to_json() if self.shuffled else None,
            "columns": self.columns,
            "strengths": self.strengths,
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> MethodResult:
        shuffled = record["shuffled"]
        return MethodResult(
            SplitScores.from_json(record), SplitScores.from_json(shuffled) if shuffled else None,
            record["columns"], record["strengths"],
        )  # fmt: skip


@dataclass(frozen=True)
class ProbeResult:
    """All probes on one data set.

    Attributes:
        methods: results by name: `latents-1`, `latents-all`, `neurons-1`, `neurons-all` (the dense probe),
            `components-16`, `majority`, and so on.
        classes: the classes that count as positive, each against the rest; with two classes, the later in order.
        examples: number of examples per class, for all classes.
        groups: number of independent groups of examples.
        parts: number of training, validation and test examples of the first split.
    """

    methods: dict[str, MethodResult]
    classes: tuple[str, ...]
    examples: dict[str, int]
    groups: int
    parts: tuple[int, int, int]

    def to_json(self) -> dict[str, Any]:
        return {
            "classes": list(self.classes),
            "examples": self.examples,
            "groups": self.groups,
            "parts": list(self.parts),
            "methods": {name: method.to_json() for name, method in self.methods.items()},
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> ProbeResult:
        methods = {name: MethodResult.from_json(method) for name, method in record["methods"].items()}
        first, second, third = record["parts"]
        return ProbeResult(
            methods, tuple(record["classes"]), record["examples"], record["groups"], (first, second, third)
        )


@in_own_modes
def probe(
    dictionary: Encoder,
    activations: Float[Tensor, "rows d_in"],
    labels: Sequence[Any],
    settings: ProbeConfig | None = None,
    *,
    groups: Sequence[int] | None = None,
) -> ProbeResult:
    """Fit probes for labels on a dictionary's latents and on the activations themselves, and score them.

    For each k of the settings, a logistic regression is fitted on the k latents whose class means differ most on the
    training examples, on k neurons (columns of the activations) chosen the same way and on k principal components. It
    is also fitted on all latents and on all neurons. The regularisation with the lowest validation log loss is chosen.
    The probe is then fitted to training and validation examples and scored once on the test examples. With more than
    two classes, each class is probed against the rest.

    Args:
        dictionary: any object with `encode`, `[batch, d_in]` → `[batch, d_sae]`.
        activations: raw activations, one row per example.
        labels: one label per example: text, or numbers and booleans, where 1, 1.0 and True are equal.
        settings: k, ranking, splits, seed; settings of texts have no effect here.
        groups: group number of each example. Examples of the same group, such as tokens of one text, are never on
            different sides of a split and count as one draw in standard errors. None: each example is its own group.

    Raises:
        ConfigError: scikit-learn is not installed.
        DataError: there are fewer than two classes or too few examples of them, a label is missing, or text is mixed
            with numbers.
        ShapeError: activations, labels and groups differ in length, or the dictionary takes another width.
    """
    return probe_examples(dictionary, labelled_activations(activations, labels, groups), settings or ProbeConfig())


def labelled_activations(
    activations: Float[Tensor, "rows d_in"], labels: Sequence[Any], groups: Sequence[int] | None
) -> LabelledActivations:
    """Activations from anywhere as those of examples, one row each.

    Raises:
        DataError: an activation is not finite, or a label is missing or of another kind than the first.
        ShapeError: activations, labels and groups differ in length.
    """
    count = len(activations)
    if len(labels) != count or (groups is not None and len(groups) != count):
        raise ShapeError(
            f"{count:,} activations, {len(labels):,} labels"
            + (f" and {len(groups):,} groups" if groups is not None else "")
            + ": expected one for each"
        )
    if not bool(activations.isfinite().all()):
        raise DataError(
            "activations have values that are infinite or not a number; remove them, or read the activations again"
        )
    return LabelledActivations(
        activations.detach().float().cpu(), torch.arange(count), tuple(_names(labels)),
        torch.arange(count) if groups is None else torch.tensor(list(groups)),
    )  # fmt: skip


def _names(labels: Sequence[Any]) -> list[str]:
    """Class names; NumPy and PyTorch scalars count as numbers."""
    values = [label.item() if hasattr(label, "item") else label for label in labels]
    missing = next((place for place, value in enumerate(values) if is_missing(value)), None)
    if missing is not None:
        raise DataError(f"labels[{missing}] is {values[missing]!r}: leave out the examples that have no label")
    other = other_kind(values)
    if other is not None:
        raise DataError(
            f"labels[{other}] is {values[other]!r}, and labels[0] is {values[0]!r}: expected text alone, or numbers "
            "and booleans; convert them"
        )
    return class_names(values)


def probe_examples(
    dictionary: Encoder, data: LabelledActivations, settings: ProbeConfig, name: str = "labels"
) -> ProbeResult:
    """`probe` for activations that were read from a language model.

    Args:
        name: name of the data set, for messages and for the draw of its shuffled labels.
    """
    require_sklearn()
    check_classes(name, data.labels)
    names, counts = np.unique(np.array(data.labels), return_counts=True)
    groups = data.groups.numpy()
    splits = [
        split_examples(
            data.labels, groups, rng=numpy_generator("probes: splits", settings.seed, number),
            test_fraction=settings.test_fraction, validation_fraction=settings.validation_fraction,
        )
        for number in range(settings.splits)
    ]  # fmt: skip
    truths = {str(label): np.array(data.labels) == label for label in (names[1:] if len(names) == 2 else names)}
    if len(names) == 2:
        for split in splits:
            check_split(split, truths[str(names[1])], f"data {name!r}")
    else:
        truths = {label: truth for label, truth in truths.items() if all(_both_sides(split, truth) for split in splits)}
        if not truths:
            raise DataError(f"data {name!r}: no class has {LEAST_PER_PART} test examples; give more examples")
    tasks = _Tasks(dictionary, data, groups, settings, name)
    outcomes = [tasks.run(split, truths, number) for number, split in enumerate(splits)]
    return ProbeResult(
        {method: _collect([split[method] for split in outcomes], list(truths)) for method in outcomes[0]},
        tuple(truths),
        {str(label): int(count) for label, count in zip(names, counts, strict=True)},
        len(np.unique(groups)),
        (len(splits[0].train), len(splits[0].validation), len(splits[0].test)),
    )


@dataclass(frozen=True)
class _Outcome:
    """The outcome of one probe for one class under one split."""

    scores: BinaryScores
    shuffled: BinaryScores | None
    columns: list[int]
    strength: float


class _Tasks:
    """The examples' latents, neurons and components, and all probes on them under a split."""

    def __init__(
        self, dictionary: Encoder, data: LabelledActivations, groups: Int[np.ndarray, " examples"],
        settings: ProbeConfig, name: str,
    ) -> None:  # fmt: skip
        self.columns = {LATENTS: data.latents(dictionary).numpy(), NEURONS: data.dense().numpy()}
        self.groups, self.settings = groups, settings
        self.name = name  # nulls of different data sets must not share a permutation

    def run(self, split: Split, truths: dict[str, Bool[np.ndarray, " rows"]], number: int) -> dict[str, list[_Outcome]]:
        """Outcomes by method, one per class."""
        rng = numpy_generator(f"probes: shuffled labels of {self.name}", self.settings.seed, number)
        shuffled = {name: _shuffled(truth, split, rng) for name, truth in truths.items()}
        outcomes: dict[str, list[_Outcome]] = {}

        def score(method: str, fit: Callable[[np.ndarray], tuple[np.ndarray, list[int], float]]) -> None:
            for name, truth in truths.items():
                decisions, columns, strength = fit(truth)
                null, _, _ = fit(shuffled[name])
                scores, null_scores = self._scores(truth, decisions, split), self._scores(shuffled[name], null, split)
                outcomes.setdefault(method, []).append(_Outcome(scores, null_scores, columns, strength))

        for kind, x in self.columns.items():
            for k in self._sizes(x.shape[1]):
                score(f"{kind}-{k}", lambda truth, x=x, k=k: self._sparse(x, split, truth, k))
            score(f"{kind}-all", _dense(x, split))
        if self.settings.pca:
            coordinates = principal_components(self.columns[NEURONS], split.train, max(self.settings.k))
            for k in self._sizes(coordinates.shape[1]):
                score(f"{COMPONENTS}-{k}", _dense(coordinates[:, :k], split))
        for truth in truths.values():
            null = majority_scores(truth[split.fitted], truth[split.test], self.groups[split.test])
            outcomes.setdefault(MAJORITY, []).append(_Outcome(null, None, [], 0.0))
        return outcomes

    def _sizes(self, most: int) -> list[int]:
        return [k for k in self.settings.k if k <= most]

    def _sparse(
        self, x: Float[np.ndarray, "rows columns"], split: Split, truth: Bool[np.ndarray, " rows"], k: int
    ) -> tuple[np.ndarray, list[int], float]:
        """A probe on the k columns that rank highest on the training rows."""
        chosen = rank_columns(x[split.train], truth[split.train], self.settings.ranking)[:k]
        linear = Design(x[:, chosen], split).fit(truth)
        return linear.decisions(x[split.test][:, chosen]), chosen[:_KEPT_COLUMNS].tolist(), linear.strength

    def _scores(self, truth: np.ndarray, decisions: np.ndarray, split: Split) -> BinaryScores:
        return binary_scores(truth[split.test], decisions, self.groups[split.test])


def _dense(
    x: Float[np.ndarray, "rows columns"], split: Split
) -> Callable[[np.ndarray], tuple[np.ndarray, list[int], float]]:
    """Probes on all columns; computations that do not depend on labels are done once."""
    design, test = Design(x, split), x[split.test]

    def fit(truth: np.ndarray) -> tuple[np.ndarray, list[int], float]:
        linear = design.fit(truth)
        return linear.decisions(test), [], linear.strength

    return fit


def _shuffled(truth: Bool[np.ndarray, " rows"], split: Split, rng: np.random.Generator) -> Bool[np.ndarray, " rows"]:
    """Labels permuted within each part. With unshuffled test labels, a null that hits on a real direction by
    chance, with either sign, would score far from ½.
    """
    shuffled = truth.copy()
    for rows in (split.train, split.validation, split.test):
        shuffled[rows] = rng.permutation(truth[rows])
    return shuffled


def _collect(outcomes: list[list[_Outcome]], classes: list[str]) -> MethodResult:
    """Collect outcomes by split into results by class."""
    by_class = list(zip(*outcomes, strict=True))
    nulls = [[outcome.shuffled for outcome in row if outcome.shuffled is not None] for row in by_class]
    return MethodResult(
        over_classes([over_splits([outcome.scores for outcome in row]) for row in by_class]),
        over_classes([over_splits(row) for row in nulls]) if nulls[0] else None,
        {name: [outcome.columns for outcome in row] for name, row in zip(classes, by_class, strict=True)},
        {name: [outcome.strength for outcome in row] for name, row in zip(classes, by_class, strict=True)},
    )


def _both_sides(split: Split, truth: Bool[np.ndarray, " rows"]) -> bool:
    parts = (truth[split.train], truth[split.validation], truth[split.test])
    return all(min(part.sum(), (~part).sum()) >= LEAST_PER_PART for part in parts)
