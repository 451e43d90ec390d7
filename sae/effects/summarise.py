"""Summarise changes into effects and correlations: means, standard errors over documents, shuffles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.effects.effects import Correlation, FeatureEffect, TokenChange
from sae.effects.interventions import ELSEWHERE, FIRING, RANDOM, Changes
from sae.effects.meter import TokenSums
from sae.model.vocabulary import Vocabulary
from sae.numerics.seeding import numpy_generator
from sae.results.estimate import Estimate, ratio

_SHUFFLES = 200
_MIDDLE = (2.5, 97.5)


@dataclass(frozen=True)
class TokenChanges:
    """The next tokens that a change makes more and less likely along the direct path, largest change first."""

    raised: tuple[TokenChange, ...] = ()
    lowered: tuple[TokenChange, ...] = ()


def summarise(feature: int, density: float, changes: Changes, tokens: TokenChanges) -> FeatureEffect:
    """One feature's effect from its changes of all kinds."""
    if not density:
        return _no_effect(feature)
    fires, random, elsewhere = (changes.at(changes.kind == kind) for kind in (FIRING, RANDOM, ELSEWHERE))
    paired = _paired(fires, random)
    return FeatureEffect(
        feature=feature,
        density=float(density),
        positions=len(fires),
        documents=len(np.unique(fires.document)),
        activation=float(fires.activation.mean()) if len(fires) else 0.0,
        loss=_mean(fires, fires.loss),
        loss_after=_mean(fires, fires.loss_after),
        kl=_mean(fires, fires.kl),
        kl_after=_mean(fires, fires.kl_after),
        direct=None if np.isnan(fires.direct).any() else _mean(fires, fires.direct),
        random_loss=_mean(random, random.loss),
        random_kl=_mean(random, random.kl),
        kl_above_random=_mean(random, paired - random.kl),
        elsewhere_loss=_mean(elsewhere, elsewhere.loss),
        elsewhere_kl=_mean(elsewhere, elsewhere.kl),
        raised=tokens.raised,
        lowered=tokens.lowered,
    )


def _no_effect(feature: int) -> FeatureEffect:
    """The effect of a feature that never fires: there is nothing to change."""
    names = ("loss", "loss_after", "kl", "kl_after", "direct")
    nulls = ("random_loss", "random_kl", "kl_above_random", "elsewhere_loss", "elsewhere_kl")
    estimates = dict.fromkeys(names, Estimate(0.0, None)) | dict.fromkeys(nulls, Estimate(None, None))
    return FeatureEffect(feature, density=0.0, positions=0, documents=0, activation=0.0, **estimates)


def token_changes(
    sums: TokenSums | None, places: int, W_U: Float[Tensor, "d_model vocab"] | None, vocabulary: Vocabulary, top: int
) -> TokenChanges:
    """Token changes of a feature; empty if the direct path is unknown or nothing was changed.

    Changes of log-probabilities are averaged over the places: (Σ Jδ) W_U / n minus the average mean logit.
    """
    if sums is None or W_U is None or not top:
        return TokenChanges()
    changes = (sums.normed.to(W_U) @ W_U)[: len(vocabulary)].double().cpu() / places
    changes -= sums.mean_logit / places
    raised, lowered = (changes.topk(min(top, len(changes)), largest=largest) for largest in (True, False))
    return TokenChanges(_named(raised, vocabulary), _named(lowered, vocabulary))


def _named(top: torch.return_types.topk, vocabulary: Vocabulary) -> tuple[TokenChange, ...]:
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(TokenChange(vocabulary.text(token), change) for token, change in pairs)


def over_features(effects: list[FeatureEffect], seed: int) -> Correlation | None:
    """Correlation between the features' mean direct and mean measured changes of the loss."""
    pairs = [
        (effect.direct.value, effect.loss.value) for effect in effects if effect.positions and effect.direct is not None
    ]
    if not pairs:
        return None
    direct, measured = np.array(pairs, dtype=np.float64).T
    draw = numpy_generator("effects: shuffled features", seed)
    shuffled = [pearson(direct, measured[draw.permutation(len(measured))]) for _ in range(_SHUFFLES)]
    return _correlation(pearson(direct, measured), shuffled, len(direct))


def over_positions(changes: Changes, seed: int) -> Correlation | None:
    """The same over all places; shuffling pairs each place with the measured change of a place of another feature."""
    fires = changes.at(changes.kind == FIRING)
    if not len(fires) or np.isnan(fires.direct).any():
        return None
    fires = fires.at(np.argsort(fires.feature, kind="stable"))
    _, start, feature, count = np.unique(fires.feature, return_index=True, return_inverse=True, return_counts=True)
    draw = numpy_generator("effects: shuffled places", seed)

    def shuffled() -> float | None:
        other = draw.permutation(len(start))[feature]
        return pearson(
            fires.direct, fires.loss[start[other] + (draw.random(len(feature)) * count[other]).astype(np.int64)]
        )

    return _correlation(pearson(fires.direct, fires.loss), [shuffled() for _ in range(_SHUFFLES)], len(fires))


def pearson(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float | None:
    """Correlation; None for fewer than two entries or if one side is constant."""
    if len(a) < 2:
        return None
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else None


def _correlation(value: float | None, shuffled: list[float | None], count: int) -> Correlation:
    nulls = [null for null in shuffled if null is not None]
    low, high = np.percentile(nulls, _MIDDLE).tolist() if value is not None and nulls else (None, None)
    return Correlation(value, low, high, count)


def _mean(changes: Changes, values: Float[np.ndarray, " n"]) -> Estimate:
    """Mean over changes, standard error over documents."""
    if not len(values):
        return Estimate(None, None)
    sums, counts = document_sums(changes.document, values)
    return ratio(torch.from_numpy(sums), torch.from_numpy(counts))


def document_sums(
    documents: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " documents"], Float[np.ndarray, " documents"]]:
    """Sum and number of the values in each document that has any."""
    _, document, counts = np.unique(documents, return_inverse=True, return_counts=True)
    return np.bincount(document, weights=values, minlength=len(counts)), counts.astype(np.float64)


def _paired(fires: Changes, random: Changes) -> Float[np.ndarray, " n"]:
    """KL of the feature's own change at the place of each random change; all are among the feature's places."""
    if not len(random):
        return np.zeros(0)
    order = np.argsort(fires.row)
    return fires.kl[order[np.searchsorted(fires.row[order], random.row)]]
