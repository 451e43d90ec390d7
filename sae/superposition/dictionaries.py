"""Experiments with dictionaries, trained on activations of known features and scored against those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from sae.config.progress import StageProgress, silent
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError, TrainingError
from sae.evaluation.recovery import (
    DirectionScores,
    by_group,
    detection,
    firing_density,
    measure_recovery,
)
from sae.numerics.modes import in_own_modes
from sae.superposition.synthetic import (
    TEST,
    VALIDATION,
    SyntheticFeatures,
    SyntheticSource,
    even_features,
    toy_features,
    uneven_features,
)
from sae.training import Recipe, train_all

RENAMED = {"world": "kind"}
"""New names in settings and results by their old ones, which stored experiments may have."""
COSINE = 0.9
"""Least cosine at which a learned direction counts as the true one, in tables by frequency."""


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of an experiment with dictionaries on known features.

    Attributes:
        kind: `toy` (the hidden activations of a toy model), `even` (random directions, features equally frequent and
            independent) or `hard` (Zipf frequencies, families, groups).
        features, d_in, mean_l0: numbers of features, of dimensions, and of features present on average; for `toy`, d_in
            is the hidden dimensions and some features may be lost.
        architectures: those to train.
        d_sae: width of each dictionary; in practice the number of features is unknown, so the default is twice that.
        k: features that fire per token; by default the mean number present.
        tokens: number of training tokens.
        batch_size: tokens per step.
        scored: rows of the samples for choosing thresholds and for scoring detection.
    """

    kind: Literal["toy", "even", "hard"] = "even"
    features: int = 512
    d_in: int = 256
    mean_l0: float = 8.0
    architectures: tuple[str, ...] = ("topk", "batch_topk")
    d_sae: int = 1024
    k: int = 8
    tokens: int = 1_000_000
    batch_size: int = 2048
    scored: int = 20_000

    def __new__(cls, *_: object, **settings: object) -> RecoverySettings:
        """Refuse a setting's old name.

        Raises:
            ConfigError: a setting has another name now.
        """
        for old, new in RENAMED.items():
            if old in settings:
                raise ConfigError(f"setting {old!r} is called {new!r} now")
        return super().__new__(cls)


@dataclass(frozen=True)
class FrequencyGroup:
    """A tenth of the true features, by how often they are present.

    Attributes:
        frequency: mean share of rows on which they are present.
        recall: share of them whose matched direction has a cosine of at least `COSINE`.
        cosine: mean cosine to the matched direction.
        detection_precision, detection_recall, f1: means, of detecting presence by the matched latent's firing.
        null_f1: mean F1 of another feature's latent.
    """

    frequency: float
    recall: float
    cosine: float
    detection_precision: float
    detection_recall: float
    f1: float
    null_f1: float


@dataclass(frozen=True)
class FiringGroup:
    """A tenth of the live learned features, by how often they fire.

    Attributes:
        density: mean share of rows on which they fire.
        precision: share of them that are matched to a true feature with a cosine of at least `COSINE`.
    """

    density: float
    precision: float


@dataclass(frozen=True)
class DictionaryScores:
    """Scores of one dictionary.

    Attributes:
        architecture: its name.
        live: features that fire on the scored sample.
        l0: features that fire per row of that sample.
        scores, null: scores of directions and of random ones, see `sae.evaluation.recovery`.
        f1, null_f1: mean detection F1 over the true features that occur, and of another feature's latent.
        by_frequency: most frequent true features first.
        by_density: most often firing learned features first.
        seconds: spent in its own training steps.
    """

    architecture: str
    live: int
    l0: float
    scores: DirectionScores
    null: DirectionScores
    f1: float
    null_f1: float
    by_frequency: tuple[FrequencyGroup, ...]
    by_density: tuple[FiringGroup, ...]
    seconds: float


@dataclass(frozen=True)
class RecoveryResult:
    """Scores of all dictionaries on the same features.

    Attributes:
        kind: as in the settings.
        features, d_in, mean_l0: as in the settings, without features that a toy model has not learned.
        measured_l0: features present per row of the scored sample.
        dictionaries: in the order of the settings.
    """

    kind: str
    features: int
    d_in: int
    mean_l0: float
    measured_l0: float
    dictionaries: tuple[DictionaryScores, ...]


@in_own_modes
def run_recovery(settings: RecoverySettings, seed: int, progress: StageProgress | None = None) -> RecoveryResult:
    """Train all architectures in one pass over the same batches, with their default settings, and score them.

    Raises:
        ConfigError: the settings of the features are invalid, or scipy is missing.
        TrainingError: one of them diverged.
        TrainingInterrupted: Ctrl-C.
    """
    make = {"toy": toy_features, "even": even_features, "hard": uneven_features}[settings.kind]
    truth = make(settings.features, settings.d_in, settings.mean_l0, seed=seed)
    recipes = {
        architecture: Recipe(
            DictionaryConfig.model_validate({"architecture": architecture, "d_sae": settings.d_sae, "k": settings.k}),
            TrainConfig(tokens=settings.tokens),
            seed,
        )
        for architecture in settings.architectures
    }
    shown = progress or silent
    shown(0, settings.tokens)
    outcome = train_all(
        {"activations": SyntheticSource(truth, settings.batch_size)},
        recipes,
        progress=lambda done, total, _: shown(done, total),
    )
    for architecture, reason in outcome.failures.items():
        raise TrainingError(f"{architecture}: {reason}")
    scores = [
        score(dictionary, truth, settings.scored, seed, outcome.costs[architecture].seconds)
        for architecture, dictionary in outcome.dictionaries.items()
    ]
    measured = float((truth.sample(settings.scored, stream=TEST).values > 0).sum()) / settings.scored
    features, d_in = truth.directions.shape
    return RecoveryResult(settings.kind, features, d_in, truth.mean_l0, measured, tuple(scores))


def score(
    dictionary: Dictionary, features: SyntheticFeatures, rows: int, seed: int = 0, seconds: float = 0.0
) -> DictionaryScores:
    """How well a dictionary recovers known features.

    Args:
        dictionary: trained on their activations.
        features: the known features.
        rows: of the sample for choosing thresholds, and of the one that is scored.
        seed: of the nulls.
        seconds: spent in its training steps.
    """
    validation, test = (features.sample(rows, stream=stream).labelled() for stream in (VALIDATION, TEST))
    density = firing_density(dictionary, test.activations)
    live = density > 0
    recovered = measure_recovery(dictionary.W_dec, features.directions, live, seed=seed)
    detected = detection(dictionary, recovered.matching, validation, test, seed=seed)
    hit = (recovered.matching.cosine >= COSINE).double()
    correct = torch.zeros(dictionary.d_sae, dtype=torch.float64)
    correct[recovered.matching.learned[hit > 0]] = 1
    frequency_rows = by_group(
        features.frequency,
        hit,
        recovered.matching.cosine,
        detected.precision,
        detected.recall,
        detected.f1,
        detected.null_f1,
    )
    return DictionaryScores(
        architecture=dictionary.architecture,
        live=int(live.sum()),
        l0=float(density.sum()),
        scores=recovered.scores,
        null=recovered.null,
        f1=detected.mean(detected.f1),
        null_f1=detected.mean(detected.null_f1),
        by_frequency=tuple(FrequencyGroup(*row) for row in frequency_rows),
        by_density=tuple(FiringGroup(*row) for row in by_group(density[live], correct[live])),
        seconds=seconds,
    )
