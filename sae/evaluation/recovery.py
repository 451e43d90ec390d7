"""How well a dictionary recovers known features: directions and detection, each with its null."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary.base import Dictionary
from sae.errors import ConfigError, ShapeError
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import torch_generator

THRESHOLDS = (0.5, 0.7, 0.9, 0.95)
"""Cosines at which precision and recall are given."""
UNMATCHED = -1
_ROWS = 4096


@dataclass(frozen=True)
class Matching:
    """A one-to-one assignment of learned features to true ones, with the largest sum of cosines.

    Attributes:
        learned: index of the learned feature; `UNMATCHED` for some if there are fewer than true ones.
        cosine: between the two; 0 if unmatched.
    """

    learned: Int[Tensor, " true"]
    cosine: Float[Tensor, " true"]


@dataclass(frozen=True)
class DirectionScores:
    """How near learned directions are to true ones. A direction and its negative are different.

    Attributes:
        mean_max_cosine_true: mean over true features of the cosine to the nearest learned one: is everything found?
        mean_max_cosine_learned: mean over learned features of the cosine to the nearest true one: is everything real?
        matched_cosine: mean over true features of the cosine to the one matched to it (see `Matching`).
        recall: by threshold t, share of the true features whose match has a cosine of at least t.
        precision: by threshold t, share of the learned features that are such a match: of several learned features
            that are near one true feature, one counts as right.
    """

    mean_max_cosine_true: float
    mean_max_cosine_learned: float
    matched_cosine: float
    recall: dict[float, float]
    precision: dict[float, float]


@dataclass(frozen=True)
class Recovery:
    """Direction scores, and those of random directions.

    Attributes:
        true, live: numbers of true features, and of learned ones that count.
        scores: of the learned directions.
        null: of as many random directions, averaged over draws.
        matching: which learned feature is matched to each true one.
    """

    true: int
    live: int
    scores: DirectionScores
    null: DirectionScores
    matching: Matching


@torch.no_grad()
@in_own_modes
def measure_recovery(
    learned: Float[Tensor, "d_sae d_in"],
    true: Float[Tensor, "true _"],
    live: Bool[Tensor, " d_sae"] | None = None,
    *,
    thresholds: tuple[float, ...] = THRESHOLDS,
    null_draws: int = 3,
    seed: int = 0,
) -> Recovery:
    """Compare a dictionary's directions, `W_dec`, with known ones.

    Args:
        learned: directions of any norm.
        true: likewise.
        live: which learned features count, such as those that fire; None: all. Those of norm 0 never count.
        thresholds: cosines.
        null_draws: number of sets of random directions, as many as are live, that the null is averaged over.
        seed: of the null.

    Raises:
        ShapeError: the directions differ in width, or there are no true ones.
        ConfigError: scipy is missing.
    """
    if learned.shape[1] != true.shape[1] or not len(true):
        raise ShapeError(
            f"learned directions {list(learned.shape)}, true ones {list(true.shape)}: expected some of one width d_in"
        )
    counts = learned.norm(dim=1) > 0
    if live is not None:
        counts &= live.to(counts.device)
    live_indices = counts.nonzero().flatten().cpu()
    matching, scores = _compare(learned.cpu()[live_indices], true, thresholds)
    if len(live_indices):
        matching = Matching(
            torch.where(matching.learned >= 0, live_indices[matching.learned], UNMATCHED), matching.cosine
        )
    nulls = []
    for draw in range(null_draws):
        noise = torch.randn(len(live_indices), true.shape[1], generator=torch_generator("recovery: null", seed, draw))
        nulls.append(_compare(noise, true, thresholds)[1])
    return Recovery(len(true), len(live_indices), scores, _mean(nulls, thresholds), matching)


def cosines(a: Float[Tensor, "a d_in"], b: Float[Tensor, "b d_in"]) -> Float[Tensor, "a b"]:
    """Cosines between all rows, in float64; 0 for a row of norm 0."""
    unit_a, unit_b = (torch.nn.functional.normalize(x.detach().cpu().double(), dim=1) for x in (a, b))
    return unit_a @ unit_b.T


def match(cosine: Float[Tensor, "true learned"]) -> Matching:
    """The one-to-one assignment of largest total cosine.

    Kuhn's Hungarian method, by scipy's `linear_sum_assignment` (Crouse 2016).

    Raises:
        ConfigError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ConfigError("matching features needs scipy: pip install 'sae[evaluation]'") from error
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cosine.numpy(), maximize=True))
    learned = torch.full((len(cosine),), UNMATCHED)
    learned[rows] = columns
    matched = torch.zeros(len(cosine), dtype=torch.float64)
    matched[rows] = cosine[rows, columns]
    return Matching(learned, matched)


def _compare(
    learned: Float[Tensor, "live d_in"], true: Float[Tensor, "true d_in"], thresholds: tuple[float, ...]
) -> tuple[Matching, DirectionScores]:
    if not len(learned):
        unmatched = Matching(torch.full((len(true),), UNMATCHED), torch.zeros(len(true), dtype=torch.float64))
        zeros = dict.fromkeys(thresholds, 0.0)
        return unmatched, DirectionScores(0.0, 0.0, 0.0, zeros, zeros)
    cosine = cosines(true, learned)
    matching = match(cosine)
    hits = {t: int((matching.cosine >= t).sum()) for t in thresholds}
    return matching, DirectionScores(
        mean_max_cosine_true=float(cosine.max(1).values.mean()),
        mean_max_cosine_learned=float(cosine.max(0).values.mean()),
        matched_cosine=float(matching.cosine.mean()),
        recall={t: count / len(true) for t, count in hits.items()},
        precision={t: count / len(learned) for t, count in hits.items()},
    )


def _mean(scores: list[DirectionScores], thresholds: tuple[float, ...]) -> DirectionScores:
    def mean(numbers: list[float]) -> float:
        return float(np.mean(numbers))

    return DirectionScores(
        mean([s.mean_max_cosine_true for s in scores]),
        mean([s.mean_max_cosine_learned for s in scores]),
        mean([s.matched_cosine for s in scores]),
        {t: mean([s.recall[t] for s in scores]) for t in thresholds},
        {t: mean([s.precision[t] for s in scores]) for t in thresholds},
    )


@dataclass(frozen=True)
class Labelled:
    """Activations, and which features are present in them.

    Attributes:
        activations: for a dictionary to encode.
        present: whether each true feature is in each row.
    """

    activations: Float[Tensor, "rows d_in"]
    present: Bool[Tensor, "rows true"]


@dataclass(frozen=True)
class Detection:
    """How well the firing of each true feature's matched latent predicts whether the feature is present.

    A latent fires if its activation exceeds a threshold, which is the one with the largest F1 on other data.

    Attributes:
        precision: share of the firings at which the feature is present; 0 without firings.
        recall: share of the feature's occurrences at which the latent fires.
        f1: 2 · precision · recall / (precision + recall).
        null_f1: the same with each true feature given another's latent, with thresholds of its own.
        occurrences: of each true feature in the test data; the scores of one without any are meaningless.
    """

    precision: Float[Tensor, " true"]
    recall: Float[Tensor, " true"]
    f1: Float[Tensor, " true"]
    null_f1: Float[Tensor, " true"]
    occurrences: Int[Tensor, " true"]

    def mean(self, of: Float[Tensor, " true"]) -> float:
        """Mean over the true features that occur."""
        return float(of[self.occurrences > 0].mean())


@torch.no_grad()
@in_own_modes
def detection(
    dictionary: Dictionary, matching: Matching, validation: Labelled, test: Labelled, *, seed: int = 0
) -> Detection:
    """Choose a threshold for the matched latent of each true feature on one sample, and score it on another.

    Unmatched features score 0.

    Args:
        dictionary: takes the samples' activations.
        matching: of its features to the true ones.
        validation: sample on which thresholds are chosen.
        test: sample on which they are scored.
        seed: of the shuffled assignment.

    Raises:
        ConfigError: fewer than two true features are matched, so that there is nothing to shuffle.
    """
    matched = (matching.learned >= 0).nonzero().flatten()
    if len(matched) < 2:
        raise ConfigError(f"{len(matched)} matched features: detection needs two, so that its null can swap them")
    latents = matching.learned[matched]
    seen, unseen = (_activations(dictionary, part.activations, latents) for part in (validation, test))
    order = torch.randperm(len(matched), generator=torch_generator("detection: null", seed))
    swapped = torch.empty_like(order)
    swapped[order] = order.roll(1)  # one cycle through all, so that none keeps its own
    labels, test_labels = validation.present[:, matched], test.present[:, matched]
    precision, recall, f1 = _scores(unseen, test_labels, best_thresholds(seen, labels))
    _, _, null_f1 = _scores(unseen[:, swapped], test_labels, best_thresholds(seen[:, swapped], labels))

    def everywhere(numbers: Tensor) -> Tensor:
        values = torch.zeros(len(matching.learned), dtype=torch.float64)
        values[matched] = numbers
        return values

    return Detection(
        precision=everywhere(precision),
        recall=everywhere(recall),
        f1=everywhere(f1),
        null_f1=everywhere(null_f1),
        occurrences=test.present.sum(0),
    )


def best_thresholds(
    activations: Float[Tensor, "rows features"], present: Bool[Tensor, "rows features"]
) -> Float[Tensor, " features"]:
    """For each column the threshold at which `activations > threshold` has the largest F1, in float64.

    It lies halfway between two values that occur, or between the smallest positive one and 0. Infinite for a column
    without a positive activation.
    """
    ranked, order = activations.double().sort(0, descending=True)
    after = torch.cat([ranked[1:], torch.zeros_like(ranked[:1])]).clamp_min(0)
    hits = present.gather(0, order).cumsum(0).double()
    fired = torch.arange(1, len(ranked) + 1)[:, None]
    f1 = 2 * hits / (fired + present.sum(0))
    possible = (ranked > after) & (ranked > 0)
    best = f1.where(possible, -1.0).max(0)
    halfway = ((ranked + after) / 2).gather(0, best.indices[None])[0]
    return halfway.where(best.values >= 0, torch.inf)


@torch.no_grad()
def firing_density(dictionary: Dictionary, activations: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_sae"]:
    """Share of the rows on which each feature fires, in float64."""
    counts = torch.zeros(dictionary.d_sae, dtype=torch.float64)
    for block in activations.split(_ROWS):
        counts += (dictionary.encode(block) > 0).sum(0).cpu()
    return counts / len(activations)


def by_group(order: Float[Tensor, " n"], *numbers: Float[Tensor, " n"], groups: int = 10) -> list[tuple[float, ...]]:
    """Means over equal groups of features, those of largest `order` first, such as deciles by frequency.

    Each group's entry begins with the mean of `order`. With fewer features than groups there are as many groups as
    features.
    """
    ranks = order.argsort(descending=True, stable=True)
    parts = ranks.tensor_split(min(groups, max(len(ranks), 1)))
    return [tuple(float(n.double()[part].mean()) for n in (order, *numbers)) for part in parts if len(part)]


def _activations(dictionary: Dictionary, x: Tensor, latents: Int[Tensor, " matched"]) -> Float[Tensor, "rows matched"]:
    return torch.cat([dictionary.encode(block)[:, latents].cpu() for block in x.split(_ROWS)])


def _scores(activations: Tensor, present: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 of each column."""
    fires = activations.double() > thresholds
    hits, fired, occurrences = (fires & present).sum(0).double(), fires.sum(0), present.sum(0)
    return hits / fired.clamp_min(1), hits / occurrences.clamp_min(1), 2 * hits / (fired + occurrences).clamp_min(1)
