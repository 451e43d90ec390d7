"""Worlds of known features: frequencies, joint frequencies, batches that repeat themselves, refusals."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch

import sae
from sae.errors import ConfigError, TrainingError
from sae.superposition import SyntheticFeatures, SyntheticSource, even_features, uneven_features
from sae.superposition.synthetic import TEST, TRAINING, VALIDATION, zipf_frequencies


@pytest.fixture(scope="module")
def hard() -> SyntheticFeatures:
    return uneven_features(60, 20, 4.0, families=4, children=3, groups=3, group_size=6, seed=2)


def test_known_mean_l0(hard: SyntheticFeatures) -> None:
    assert even_features(100, 30, 5.0).mean_l0 == pytest.approx(5)
    assert hard.mean_l0 == pytest.approx(4, abs=1e-5)
    counts = (hard.sample(40_000).values > 0).sum(1).double()
    assert abs(float(counts.mean()) - 4) < 4 * float(counts.std()) / 200


def test_frequencies_and_joint_frequencies_are_those_of_the_samples(hard: SyntheticFeatures) -> None:
    rows = 60_000
    present = (hard.sample(rows).values > 0).double()
    joint = hard.joint_frequency()
    measured = present.T @ present / rows
    errors = (joint * (1 - joint) / rows).sqrt()
    deviations = (measured - joint) / (errors + 1 / rows)
    assert float(deviations.abs().max()) < 5.5, "of 1,830 pairs"
    several = joint * rows > 20
    assert int(several.sum()) > 1000
    squares = ((measured - joint) / errors).square()[several]
    assert float(squares.mean()) == pytest.approx(1, abs=0.2)
    independent = torch.outer(hard.frequency, hard.frequency).double()
    assert int((joint > 1.5 * independent).sum()) > 100, "nothing is correlated"


def test_a_child_is_there_only_with_its_parent(hard: SyntheticFeatures) -> None:
    present = hard.sample(20_000).values > 0
    children = (hard.parent >= 0).nonzero().flatten()
    assert len(children) == 4 * 3
    assert present[:, children].any(0).all()
    assert not (present[:, children] & ~present[:, hard.parent[children]]).any()
    assert (hard.parent[hard.parent[children]] < 0).all(), "parents have parents"
    assert (hard.frequency[children] < hard.frequency[hard.parent[children]]).all()


def test_a_group_occurs_together(hard: SyntheticFeatures) -> None:
    members = (hard.gate == 1).nonzero().flatten()
    assert len(members) == 6
    present = (hard.sample(40_000).values[:, members] > 0).double()
    apart = ~torch.eye(6, dtype=torch.bool)
    p, gate = hard.frequency[members].double(), float(hard.gates[1])
    together = torch.outer(p, p) * (1 / gate - 1)  # p_i p_j / gate, less the p_i p_j of independent ones
    expected = (together / torch.outer(p * (1 - p), p * (1 - p)).sqrt())[apart]
    correlations = torch.corrcoef(present.T)[apart]
    assert float(expected.min()) > 5 / 200, "of which 1/200 is the standard error"
    assert float((correlations - expected).abs().max()) < 4 / 200


def test_magnitudes_are_uniform_and_activations_their_sum(hard: SyntheticFeatures) -> None:
    sample = hard.sample(20_000)
    magnitudes = sample.values[sample.values > 0].double()
    assert float(magnitudes.mean()) == pytest.approx(1 / 2, abs=0.01)
    assert float(magnitudes.square().mean()) == pytest.approx(1 / 3, abs=0.01)
    row = sum(float(v) * d for v, d in zip(sample.values[7], hard.directions, strict=True))
    torch.testing.assert_close(sample.activations[7], row)
    torch.testing.assert_close(hard.directions.norm(dim=1), torch.ones(60))


def test_zipf() -> None:
    p = zipf_frequencies(200, 3.0, 1.0, 0.1).double()
    assert float(p.sum()) == pytest.approx(3, abs=1e-5)
    assert float(p[0]) == pytest.approx(0.1) and float(p.max()) <= 0.1 + 1e-7
    assert float(p[199] / p[99]) == pytest.approx(1 / 2, rel=1e-5)
    assert zipf_frequencies(200, 3.0, 0.0, 0.1).tolist() == pytest.approx([3 / 200] * 200)


def test_a_batch_is_the_same_whenever_it_is_asked_for(hard: SyntheticFeatures) -> None:
    source = SyntheticSource(hard, 64)
    first = [batch.clone() for batch in itertools.islice(source, 5)]
    assert source.state_dict() == {"next": 5, "streams": 2}
    again = SyntheticSource(hard, 64)
    again.load_state_dict({"next": 3, "streams": 2})
    assert torch.equal(next(iter(again)), first[3])
    streams = [hard.sample(64, 0, stream).activations for stream in (TRAINING, VALIDATION, TEST)]
    assert torch.equal(streams[0], first[0])
    for a, b in itertools.combinations([*streams, first[1]], 2):
        assert not torch.isclose(a, b).all(1).any() or bool((a == 0).all(1).any())


def test_samples_of_other_directions_are_not_gone_on_with(hard: SyntheticFeatures) -> None:
    """A state without a version is from before streams had one: directions and samples were others."""
    with pytest.raises(TrainingError, match=r"began on samples of version 1 of the random streams, .* or start again"):
        SyntheticSource(hard, 64).load_state_dict({"next": 3})


def test_worlds_of_one_seed_share_nothing() -> None:
    worlds = (
        even_features(60, 30, 4.0, seed=2),
        uneven_features(60, 30, 4.0, families=4, children=3, groups=2, group_size=6, seed=2),
    )
    one, other = (world.directions for world in worlds)
    assert float((one * other).sum(1).mean().abs()) < 0.15
    one, other = (world.sample(4000).values > 0 for world in worlds)
    assert float((one & other).float().mean()) < 1.3 * float(one.float().mean() * other.float().mean())


def test_statistics_are_those_of_the_world(hard: SyntheticFeatures) -> None:
    statistics = SyntheticSource(hard, 4096).statistics
    mean = (hard.frequency / 2) @ hard.directions
    assert float((statistics.mean - mean).norm()) < 0.05
    moments = hard.joint_frequency() / 4
    index = torch.arange(60)
    moments[index, index] = hard.frequency.double() / 3
    gram = hard.directions.double() @ hard.directions.double().T
    assert statistics.mean_squared_norm == pytest.approx(float((moments * gram).sum()), rel=0.02)


def test_training_does_not_begin_with_the_answer() -> None:
    """A dictionary of the same seed and shape is initialised from other random numbers than the world."""
    world = even_features(40, 16, 2.0, seed=3)
    source = SyntheticSource(world, 64)
    untrained = sae.train(source, sae.DictionaryConfig(d_sae=40, k=2), sae.TrainConfig(tokens=64, lr=1e-9), seed=3)
    cosines = (world.directions * untrained.W_dec).sum(1)
    assert float(cosines.abs().max()) < 0.95 and float(cosines.abs().mean()) < 0.4


def test_training_resumes_from_a_world(tmp_path, hard: SyntheticFeatures) -> None:
    def trained(folder, tokens: int) -> sae.Dictionary:
        settings = sae.TrainConfig(tokens=tokens, checkpoint_every=4, log_every=4, decay_fraction=0)
        return sae.train(SyntheticSource(hard, 32), sae.DictionaryConfig(d_sae=40, k=2), settings, folder=folder)

    whole = trained(tmp_path / "whole", 8 * 32)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step-00000008", ignore_errors=True)
    kept = sorted(path.name for path in (tmp_path / "part" / "checkpoints").iterdir())
    assert len(kept) == 1, kept
    resumed = trained(tmp_path / "part", 8 * 32)
    assert torch.equal(whole.W_dec, resumed.W_dec)


def test_impossible_worlds_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="mean_l0=200: expected a number above 0 and up to the number of features, 10"
    ):
        even_features(10, 4, 200.0)
    with pytest.raises(ConfigError, match="24 families of 5 and 16 groups of 8 need 248 features, and there are 100"):
        uneven_features(100, 10, 4.0)
    with pytest.raises(ConfigError, match="mean_l0=40: expected a number above 0 and below 100 features times"):
        uneven_features(100, 10, 40.0, families=2, groups=2)
    with pytest.raises(ConfigError, match=r"most_frequent=1\.5: expected a probability"):
        uneven_features(100, 10, 4.0, families=2, groups=2, most_frequent=1.5)
