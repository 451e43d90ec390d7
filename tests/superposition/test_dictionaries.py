"""Dictionaries on worlds of known features: they are found, and the null is not."""

from __future__ import annotations

import pytest
import torch

from sae.architectures import TopK
from sae.superposition import even_features, uneven_features
from sae.superposition.dictionaries import RecoverySettings, run_recovery, score


def test_an_oracle_scores_one_and_chance_does_not() -> None:
    """The true directions as a dictionary, on features that hardly overlap."""
    world = even_features(24, 24, 2.0, seed=1)
    axes = torch.linalg.qr(world.directions.T).Q.T.contiguous()
    world = type(world)(axes, world.frequency, world.chance, world.gate, world.gates, world.parent, world.seed)
    oracle = TopK(24, 24, k=24).requires_grad_(False)
    oracle.W_dec.copy_(axes)
    oracle.W_enc.copy_(axes.T)
    made = score(oracle, world, 4000)
    assert made.scores.matched_cosine == pytest.approx(1)
    assert made.f1 > 0.99 and made.null_f1 < 0.3 and made.null.recall[0.9] == 0
    assert [group.recall for group in made.by_frequency] == [1] * 10


def test_deciles_follow_frequency() -> None:
    """A dictionary that has the most frequent half only."""
    world = uneven_features(80, 40, 4.0, families=4, children=4, groups=2, group_size=5, seed=0)
    half = TopK(40, 40, k=8).requires_grad_(False)
    half.W_dec.copy_(world.directions[:40])
    half.W_enc.copy_(world.directions[:40].T)
    made = score(half, world, 4000)
    assert [group.recall for group in made.by_frequency] == [1] * 5 + [0] * 5
    assert [group.precision for group in made.by_density] == [1] * 10
    frequencies = [group.frequency for group in made.by_frequency]
    assert frequencies == sorted(frequencies, reverse=True)
    assert sum(frequencies) * 8 == pytest.approx(4, abs=1e-4)


def test_a_dictionary_recovers_what_a_toy_model_has_laid_out() -> None:
    """32 features in 10 dimensions."""
    settings = RecoverySettings(
        "toy", 32, 10, 0.5, architectures=("topk",), d_sae=64, k=1, tokens=200_000, batch_size=1024, scored=4000
    )
    made = run_recovery(settings, seed=0)
    dictionary = made.dictionaries[0]
    assert (made.features, made.d_in) == (32, 10), "all features are learned"
    assert dictionary.scores.recall[0.9] >= 0.95, dictionary
    assert dictionary.null.recall[0.9] <= 0.05 and dictionary.null.mean_max_cosine_true < 0.75
    assert dictionary.f1 > 0.7 and dictionary.null_f1 < 0.1


@pytest.mark.slow
def test_dictionaries_recover_128_features_in_64_dimensions() -> None:
    settings = RecoverySettings(
        "even", features=128, d_in=64, mean_l0=4.0, d_sae=256, k=4, tokens=300_000, batch_size=1024, scored=4000
    )
    for dictionary in run_recovery(settings, seed=0).dictionaries:
        assert dictionary.scores.recall[0.9] >= 0.95, dictionary
        assert dictionary.null.recall[0.9] == 0 and dictionary.null.mean_max_cosine_true < 0.5
        assert dictionary.f1 > 3 * dictionary.null_f1


@pytest.mark.slow
def test_topk_and_batch_topk_recover_512_features_in_256_dimensions() -> None:
    made = run_recovery(RecoverySettings("even", tokens=350_000, scored=5000), seed=0)
    for dictionary in made.dictionaries:
        assert dictionary.scores.recall[0.9] >= 0.95, dictionary
        assert dictionary.scores.precision[0.9] >= 0.6
        assert dictionary.null.recall[0.5] == 0
        assert dictionary.null.mean_max_cosine_true == pytest.approx(0.19, abs=0.01)
        assert dictionary.f1 > 3 * dictionary.null_f1
    assert made.measured_l0 == pytest.approx(8, abs=0.2)
