"""Find features that fire where a concept is present: a search over all of them with its null, and a held-out score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.errors import DataError
from sae.files.formats import Format
from sae.files.kept import KeptResult
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import numpy_generator
from sae.probing.activations import Encoder, LabelledActivations
from sae.probing.areas import RankedColumns, shuffled_labels
from sae.probing.examples import check_classes
from sae.probing.scores import auc, auc_difference
from sae.probing.settings import ConceptConfig
from sae.probing.sparse_probes import labelled_activations
from sae.probing.splits import Halves, split_in_halves
from sae.results.estimate import Estimate
from sae.results.sheet import ShownExample

RESULT = KeptResult(Format("sae-concept", 1), "concept.json")
_SHOWN, _MISSED = 6, 2
"""Held-out examples shown with a feature: those on which it is strongest, and positive ones on which it is weakest."""
_AROUND = 24
"""Tokens shown on either side of the strongest one."""


@dataclass(frozen=True)
class FoundFeature:
    """A feature, or a neuron, that the search ranked.

    Attributes:
        index: its number.
        search_auc: AUC on the half that was searched; biased upwards by the search.
        p: share of searches under shuffled labels whose best AUC is at least `search_auc`.
        auc: AUC on the other half.
        fires_with: share of the held-out examples with the concept on which it is not 0.
        fires_without: share of the others.
        sign: −1 for a neuron that is lower where the concept is present.
        examples: held-out examples; empty for a neuron, or if the texts of tokens are unknown.
    """

    index: int
    search_auc: float
    p: float
    auc: Estimate
    fires_with: float
    fires_without: float
    sign: int = 1
    examples: tuple[ShownExample, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        record = {**vars(self), "auc": self.auc.to_json(), "examples": [vars(example) for example in self.examples]}
        return {name: value for name, value in record.items() if name != "sign" or value < 0}


@dataclass(frozen=True)
class NullSearch:
    """The same search with shuffled labels, many times.

    Attributes:
        search_auc: mean over the searches of the best AUC, on the half that was searched.
        search_high: the best AUC that 5 % of the searches reach.
        auc: mean of these columns' AUC on the other half, whose labels are shuffled too.
        deviation: standard deviation of the latter over the searches.
    """

    search_auc: float
    search_high: float
    auc: float
    deviation: float

    def to_json(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class ConceptSearch:
    """The features of a dictionary that tell examples with a concept from examples without.

    Attributes:
        name: what was searched for.
        positive: the label of examples with the concept.
        features: the features with the highest AUC in the search, best first.
        neuron: the neuron (dimension of the activations) that the same search finds, of either sign.
        gain: held-out AUC of the best feature minus that of the neuron.
        null: the search among features with shuffled labels.
        neuron_null: the same among neurons.
        examples: number of examples with and without the concept, in the half that was searched.
        held_out: the same in the other half.
        groups: number of groups of examples in the two halves.
        d_sae: number of features that were searched.
        left_out: number of texts and spans without a label or without a token that counts.
        equal: number of texts that are equal to an earlier one, and in the same half.
        settings: settings of the search.
        subject: dictionary, model and hook point, if known.
    """

    name: str
    positive: str
    features: tuple[FoundFeature, ...]
    neuron: FoundFeature
    gain: Estimate
    null: NullSearch
    neuron_null: NullSearch
    examples: tuple[int, int]
    held_out: tuple[int, int]
    groups: tuple[int, int]
    d_sae: int
    left_out: int
    equal: int
    settings: ConceptConfig
    subject: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> FoundFeature:
        """The feature with the highest AUC in the search."""
        return self.features[0]

    def to_json(self) -> dict[str, Any]:
        """The content of the file that `sae find --json` writes."""
        parts = {name: getattr(self, name).to_json() for name in ("neuron", "gain", "null", "neuron_null")}
        counts = {name: list(getattr(self, name)) for name in ("examples", "held_out", "groups")}
        return RESULT.headed(
            {
                "name": self.name,
                "positive": self.positive,
                "features": [feature.to_json() for feature in self.features],
                **parts,
                **counts,
                **{name: getattr(self, name) for name in ("d_sae", "left_out", "equal", "subject")},
                "settings": self.settings.model_dump(mode="json"),
            }
        )


@in_own_modes
def find_concept(
    dictionary: Encoder,
    activations: Float[Tensor, "rows d_in"],
    labels: Sequence[Any],
    settings: ConceptConfig | None = None,
    *,
    groups: Sequence[int] | None = None,
    name: str = "labels",
) -> ConceptSearch:
    """Find the features that fire where a concept is present, among activations from anywhere.

    The examples are split into two halves, and no group is in both. On one half, features are ranked by the AUC of
    their activation, P(higher with the concept) + ½ P(equal); ties go to the larger difference of means. The p value of
    a feature is the share of searches with shuffled labels whose best AUC, over all features, is at least as high: it
    accounts for the number of features that were searched (max statistic, Westfall & Young 1993; with the given labels
    as one of the draws, Phipson & Smyth 2010). On the other half, the AUC of the same feature is not biased by the
    search; its standard error is DeLong's, over groups (`sae.probing.scores.auc`). The best single neuron is chosen by
    the same rule, with the sign that the searched half gives it.

    Args:
        dictionary: any object with `encode`, `[batch, d_in]` → `[batch, d_sae]`.
        activations: raw activations, one row per example.
        labels: one label per example, of two or more classes.
        settings: which label is the concept, number of shuffles, seed; settings of texts have no effect here.
        groups: group number of each example, such as the text or the author it comes from. None: each example is its
            own group.
        name: what is searched for.

    Raises:
        DataError: there are fewer than two classes or too few examples of them, or a label is missing.
        ShapeError: activations, labels and groups differ in length, or the dictionary takes another width.
    """
    data = labelled_activations(activations, labels, groups)
    return find_in_examples(dictionary, data, settings or ConceptConfig(), name)


def find_in_examples(
    dictionary: Encoder, data: LabelledActivations, settings: ConceptConfig, name: str
) -> ConceptSearch:
    """`find_concept` for activations that were read from a language model."""
    check_classes(name, data.labels)
    positive = concept_label(name, data.labels, settings.positive)
    truth, groups = np.array(data.labels) == positive, data.groups.numpy()
    halves = split_in_halves(truth, groups, numpy_generator("concepts: halves", settings.seed), f"data {name!r}")
    search, held_out = (
        shuffled_labels(
            truth[rows], groups[rows], numpy_generator("concepts: shuffled labels", settings.seed, number),
            settings.permutations,
        )
        for number, rows in enumerate((halves.search, halves.held_out))
    )  # fmt: skip
    case = _Case(truth, groups, halves, (search, held_out))
    latents, neurons = data.latents(dictionary).numpy(), data.dense().numpy()
    features, null = case.search(latents, settings.listed)
    [neuron], neuron_null = case.search(neurons, 1, signed=False)
    rows = halves.held_out
    gain = auc_difference(
        truth[rows], latents[rows, features[0].index], neuron.sign * neurons[rows, neuron.index], groups[rows]
    )
    return ConceptSearch(
        name,
        positive,
        tuple(
            _with_examples(feature, dictionary, data, truth, rows, latents[:, feature.index]) for feature in features
        ),
        neuron,
        gain,
        null,
        neuron_null,
        _counts(truth[halves.search]),
        _counts(truth[rows]),
        (len(np.unique(groups[halves.search])), len(np.unique(groups[rows]))),
        latents.shape[1],
        data.left_out,
        data.equal,
        settings,
    )


def concept_label(name: str, labels: Sequence[str], positive: str | None) -> str:
    """The label that is the concept; by default the later of two in order.

    Raises:
        DataError: there is no such label, or there are more than two and none is named.
    """
    classes = sorted(set(labels))
    if positive is None and len(classes) == 2:
        return classes[1]
    if positive not in classes:
        which = "several labels" if positive is None else f"no label {positive!r}"
        listed = ", ".join(map(repr, classes[:8])) + (", …" if len(classes) > 8 else "")
        raise DataError(f"data {name!r}: {which}; set positive=LABEL to one of: {listed}")
    return positive


@dataclass(frozen=True)
class _Case:
    """Labels of the examples, their halves, and shuffled labels of each half."""

    truth: Bool[np.ndarray, " examples"]
    groups: Int[np.ndarray, " examples"]
    halves: Halves
    shuffled: tuple[Bool[np.ndarray, "draws search"], Bool[np.ndarray, "draws held_out"]]

    def search(
        self, x: Float[np.ndarray, "examples columns"], listed: int, *, signed: bool = True
    ) -> tuple[list[FoundFeature], NullSearch]:
        """The columns with the highest AUC, and the null of the search for them.

        Of columns with the same AUC, that with the larger difference of the means, in standard deviations, is first.

        Args:
            x: the columns.
            listed: number of columns.
            signed: a column has to be higher with the concept; else it may be lower, and has the sign −1.
        """
        search, held_out = self.halves.search, self.halves.held_out
        ranked, others = RankedColumns(x[search]), RankedColumns(x[held_out])
        areas = ranked.areas(self.truth[search][None])[0]
        strength = areas if signed else np.maximum(areas, 1 - areas)
        best, chosen, signs = self._best_of_shuffled(ranked, signed)
        scored = others.areas_of(self.shuffled[1], chosen)
        scored = np.where(signs, scored, 1 - scored)
        null = NullSearch(
            float(best.mean()), float(np.quantile(best, 0.95, method="higher")), float(scored.mean()),
            float(scored.std(ddof=1)),
        )  # fmt: skip
        found = []
        for column in np.lexsort((-_difference(x[search], self.truth[search]), -strength))[:listed].tolist():
            sign = 1 if signed or areas[column] >= 0.5 else -1
            values, truth = x[held_out, column], self.truth[held_out]
            p = (1 + int((best >= strength[column]).sum())) / (1 + len(best))
            estimate = auc(truth, sign * values, self.groups[held_out])
            fires = [float((values[rows] != 0).mean()) for rows in (truth, ~truth)]
            found.append(FoundFeature(column, float(strength[column]), p, estimate, fires[0], fires[1], sign))
        return found, null

    def _best_of_shuffled(
        self, ranked: RankedColumns, signed: bool
    ) -> tuple[Float[np.ndarray, " draws"], Int[np.ndarray, " draws"], Bool[np.ndarray, " draws"]]:
        """For each draw of labels the highest AUC, its column, and whether that is higher with the concept."""
        labels = self.shuffled[0]
        best = np.full(len(labels), -np.inf)
        chosen, signs = np.zeros(len(labels), dtype=np.int64), np.ones(len(labels), dtype=bool)
        draws = np.arange(len(labels))
        for block, areas in ranked.blocks_of_areas(labels):
            strength = areas if signed else np.maximum(areas, 1 - areas)
            column = strength.argmax(1)
            better = strength[draws, column] > best
            best = np.where(better, strength[draws, column], best)
            chosen = np.where(better, block.start + column, chosen)
            signs = np.where(better, (areas[draws, column] >= 0.5) | signed, signs)
        return best, chosen, signs


def _difference(
    x: Float[np.ndarray, "examples columns"], truth: Bool[np.ndarray, " examples"]
) -> Float[np.ndarray, " columns"]:
    """|difference of the means of the two sides| in standard deviations; 0 for a constant column."""
    x = x.astype(np.float64)
    deviation = x.std(0)
    difference = np.abs(x[truth].mean(0) - x[~truth].mean(0))
    return np.divide(difference, deviation, out=np.zeros_like(difference), where=deviation > 0)


def _counts(truth: Bool[np.ndarray, " examples"]) -> tuple[int, int]:
    return int(truth.sum()), int((~truth).sum())


def _with_examples(
    feature: FoundFeature, dictionary: Encoder, data: LabelledActivations, truth: Bool[np.ndarray, " examples"],
    held_out: Int[np.ndarray, " held_out"], values: Float[np.ndarray, " examples"],
) -> FoundFeature:  # fmt: skip
    """The feature with held-out examples: the strongest, then positive ones on which it is weakest."""
    if data.texts is None:
        return feature
    order = held_out[np.argsort(-values[held_out], kind="stable")]
    strongest = [row for row in order[:_SHOWN].tolist() if values[row] > 0]
    missed = [row for row in order[::-1].tolist() if truth[row] and row not in strongest][:_MISSED]
    shown = [_shown(row, feature.index, dictionary, data, bool(truth[row])) for row in (*strongest, *missed)]
    return FoundFeature(**{**vars(feature), "examples": tuple(shown)})


@torch.no_grad()
def _shown(
    example: int, feature: int, dictionary: Encoder, data: LabelledActivations, positive: bool
) -> ShownExample:  # fmt: skip
    assert data.texts is not None
    rows = (data.example == example).nonzero().flatten()
    values = dictionary.encode(data.rows[rows])[:, feature].detach().float().cpu().tolist()
    tokens = data.texts.pieces[data.texts.context[int(rows[0])]]
    activations = [0.0] * len(tokens)
    for row, value in zip(rows.tolist(), values, strict=True):
        activations[data.texts.position[row]] = value
    strongest = data.texts.position[int(rows[int(np.argmax(values))])]
    first, last = max(0, strongest - _AROUND), strongest + _AROUND + 1
    return ShownExample(
        positive, sum(values) / len(values), list(tokens[first:last]), activations[first:last], strongest - first
    )
