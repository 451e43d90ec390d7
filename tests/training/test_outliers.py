"""Rows far from all others are left out of training, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sae
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.errors import TrainingError
from sae.numerics.statistics import Statistics
from sae.training import IterableSource, train
from sae.training.outliers import Outliers
from tests.training.test_scale import old_batches

VERSION_2 = Path(__file__).parents[1] / "files" / "versions" / "51dc42b"
BATCH, D_IN = 128, 12


def rows(seed: int, count: int = BATCH, mean: float = 0.0) -> Tensor:
    random = np.random.default_rng([seed, 20261201])
    return torch.from_numpy((random.standard_normal((count, D_IN)) + mean).astype(np.float32))


def outliers(*means: Tensor, multiple: float = 10.0) -> Outliers:
    return Outliers(multiple, means or (torch.zeros(D_IN),), is_replayable=False)


def seen(found: Outliers, *batches: Tensor) -> Outliers:
    for x in batches:
        found.record(found.clean(x, x))
    return found


def usual_by_hand(x: np.ndarray) -> float:
    """Go through the rows, from the farthest counted one, until half of the energy is behind."""
    distances = sorted(np.linalg.norm(x, axis=1), reverse=True)[max(1, len(x) // 1024) :]
    half, total = sum(d**2 for d in distances) / 2, 0.0
    for distance in distances:
        total += distance**2
        if total >= half:
            return float(distance)
    raise AssertionError


@pytest.mark.parametrize("tail", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("count", [2, 33, 3000])
def test_what_is_usual(tail: float, count: int) -> None:
    """Rows farther than it have half of the energy, for light and heavy tails."""
    sizes = np.exp(tail * np.random.default_rng([2, 20261201]).standard_normal((count, 1)))
    x = rows(1, count) * torch.from_numpy(sizes.astype(np.float32))
    found = seen(outliers(multiple=1e9), x)
    assert float(found.usual[0]) == pytest.approx(usual_by_hand(x.numpy()), rel=1e-5)


def test_a_batch_without_outliers_stays_what_it_is() -> None:
    x = rows(0)
    cleaned = outliers().clean(x, x)
    assert cleaned.x is x
    assert cleaned.target is x
    assert int(cleaned.left_out) == 0
    assert float(cleaned.variance) == pytest.approx(x.double().numpy().var(0).sum(), rel=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_each_outlier_gives_way_to_another_row(mean: float) -> None:
    """The n-th to the n-th good one, wherever the mean is."""
    x, target = rows(0, mean=mean), rows(1)
    before = x.clone()
    x[0], x[77] = mean + 30 * (before[0] - mean), mean + 2000 * (before[77] - mean)
    found = outliers(torch.full((D_IN,), mean), torch.zeros(D_IN))
    found.record(found.clean(before, target))
    target[5] *= 50
    cleaned = found.clean(x, target)
    expected = torch.arange(BATCH)
    expected[[0, 5, 77]] = torch.tensor([1, 2, 3])
    assert int(cleaned.left_out) == 3
    assert torch.equal(cleaned.x, x[expected])
    assert torch.equal(cleaned.target, target[expected])
    assert float(cleaned.variance) == pytest.approx(target[expected].double().numpy().var(0).sum(), rel=1e-5)


def test_the_multiple_is_the_boundary() -> None:
    """Of the usual distance, which is 1 for all but one row."""
    directions = torch.nn.functional.normalize(rows(3, 2000), dim=1)
    x = torch.cat([directions, -directions])
    for distance, left_out in ((9.9, 0), (10.2, 1)):
        x[5] = directions[5] * distance
        assert int(outliers().clean(x, x).left_out) == left_out


def test_several_in_one_batch_do_not_hide_each_other() -> None:
    x, hidden = rows(0), rows(1)
    hidden[:8] *= 1e4
    assert int(outliers().clean(hidden, hidden).left_out) == 0, "nothing else is known"
    assert int(seen(outliers(), x).clean(hidden, hidden).left_out) == 8


def test_another_distribution_is_no_outlier() -> None:
    found = seen(outliers(), rows(0))
    other = rows(1)
    other[: BATCH // 8 + 1] *= 1e4
    assert int(found.clean(other, other).left_out) == 0
    other = 1e4 * rows(2)
    assert int(found.clean(other, other).left_out) == 0


def test_rare_rows_in_a_sea_of_zeros_stay() -> None:
    found = outliers()
    for number in range(20):
        x = torch.zeros(BATCH, D_IN)
        x[number : number + 4] = rows(number, 4)
        cleaned = found.clean(x, x)
        assert int(cleaned.left_out) == 0
        found.record(cleaned)
    one = torch.zeros(BATCH, D_IN)
    one[3] = 1.0
    assert int(outliers().clean(one, one).left_out) == 0


def test_rows_for_a_threshold_are_judged_like_a_batch() -> None:
    """Also if two outliers in the first batch made themselves usual."""
    first = rows(0)
    first[:3] *= 1000
    found, x = seen(outliers(), first), rows(1)
    x[9] *= 100
    assert float(found.usual[0]) > 1000
    assert torch.equal(found.without(x), x[torch.arange(BATCH) != 9])


def test_rows_for_a_threshold() -> None:
    found, x = seen(outliers(), rows(0)), rows(1)
    x[9] *= 40
    assert torch.equal(found.without(x), x[torch.arange(BATCH) != 9])


# Trainings


def data(with_outliers: bool, count: int = 30) -> list[Tensor]:
    """Batches; in every third, one row is 200 times as long, or the row that takes its place."""
    batches = [rows(number) for number in range(count)]
    for x in batches[1::3]:
        x[9] = 200 * x[9] if with_outliers else x[0]
    return batches


def source(batches: list[Tensor]) -> IterableSource:
    made = IterableSource(batches)
    made.statistics = Statistics(BATCH, torch.zeros(D_IN), float(D_IN))  # the same with and without outliers
    return made


def settings(**chosen) -> TrainConfig:
    return TrainConfig(tokens=30 * BATCH, batch_size=BATCH, log_every=10, dead_after_tokens=5 * BATCH, **chosen)


def shape(architecture: str) -> DictionaryConfig:
    return DictionaryConfig(architecture=architecture, d_sae=32, k=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["topk", "relu", "gated", "jumprelu"])
def test_training_is_as_if_other_rows_had_been_there(architecture: str) -> None:
    """Bit for bit; without the setting it is another."""
    ours = train(source(data(True)), shape(architecture), settings(), seed=1)
    expected = train(source(data(False)), shape(architecture), settings(), seed=1)
    without = train(source(data(True)), shape(architecture), settings(max_activation_norm_multiple=None), seed=1)
    for (name, parameter), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert not torch.allclose(ours.W_enc, without.W_enc, rtol=1e-2)
    assert ours.metadata["trained"]["left_out"] == 10
    assert without.metadata["trained"]["left_out"] == 0


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "gated"])
def test_the_scale_is_not_that_of_outliers(architecture: str) -> None:
    """With statistics of all rows, in which outliers have most of the variance, the penalty weighs as without them."""
    fixed = {"l0_coefficient": 0.3} if architecture == "jumprelu" else {"l1_coefficient": 0.3}
    batches = data(True)
    source_with, source_without = IterableSource(batches, estimate_from=30), IterableSource(data(False))
    assert source_with.statistics.variance > 10 * source_without.statistics.variance
    ours, expected = (train(s, shape(architecture), settings(**fixed), seed=1) for s in (source_with, source_without))
    scales = [one.metadata["trained"]["normalisation_scale"] for one in (ours, expected)]
    assert scales[0] == pytest.approx(scales[1], rel=0.05)
    x = rows(1000, 2000)
    l0 = [float((one.encode(x) > 0).float().sum(1).mean()) for one in (ours, expected)]
    assert l0[0] == pytest.approx(l0[1], rel=0.1)


@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka"])
def test_the_batch_rule_without_outliers(architecture: str) -> None:
    """Thresholds come from rows without the outliers, not with others in their place."""
    ours = train(source(data(True)), shape(architecture), settings(), seed=1)
    expected = train(source(data(False)), shape(architecture), settings(), seed=1)
    assert torch.equal(ours.W_enc, expected.W_enc)
    assert torch.equal(ours.W_dec, expected.W_dec)
    torch.testing.assert_close(ours.threshold, expected.threshold, rtol=0.02, atol=0)


def test_a_resumed_training_leaves_out_the_same(tmp_path: Path) -> None:
    chosen = settings(checkpoint_every=11)
    whole = train(source(data(True)), shape("batch_topk"), chosen, folder=tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["left_out"] for line in lines] == [3, 7, 10]
    part = tmp_path / "part"
    (part / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000022", part / "checkpoints" / "step-00000022")
    resumed = train(source(data(True)), shape("batch_topk"), chosen, folder=part)
    for (name, parameter), other in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(parameter, other[1]), name
    assert resumed.metadata == whole.metadata


def test_what_is_not_finite_is_still_reported() -> None:
    for value in (float("nan"), float("inf")):
        batches = data(False)
        batches[4][3, 2] = value
        with pytest.raises(TrainingError, match=r"NaN at step 5, batch 4 .*the activations themselves are not finite"):
            train(source(batches), shape("topk"), settings())


@pytest.mark.parametrize("multiple", [10.0, None])
def test_a_checkpoint_of_version_2_goes_on_without_leaving_out(multiple: float | None, tmp_path: Path) -> None:
    """`versions/51dc42b` has step 20 of 40 and the end, made with that commit, of data with a row 300 times as long in
    every fourth batch. A multiple is neither recorded nor compared.
    """
    shutil.copytree(VERSION_2, tmp_path, dirs_exist_ok=True)
    batches = old_batches()
    for x in batches[1::4]:
        x[7] *= 300
    chosen = TrainConfig(
        tokens=40 * 64, batch_size=64, log_every=10, checkpoint_every=20, keep_checkpoints=9, dead_after_tokens=640,
        lr=0.01, max_activation_norm_multiple=multiple,
    )  # fmt: skip
    config = DictionaryConfig(architecture="batch_topk", d_sae=16, k=2)
    resumed = train(IterableSource(batches), config, chosen, seed=5, folder=tmp_path)
    expected = sae.load(VERSION_2)
    for (name, ours), theirs in zip(resumed.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    trained = resumed.metadata["trained"]
    assert trained["left_out"] == 0
    assert "max_activation_norm_multiple" not in trained["settings"]
    state = torch.load(tmp_path / "checkpoints" / "step-00000040" / "state.pt", weights_only=True)
    assert state["version"] == 2, "and so does a resumption of this"
