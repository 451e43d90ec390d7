"""Trainings of transcoders: planted maps are found, widths may differ, resumption is exact, starts are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import sae
from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import Frame
from sae.errors import ConfigError, TrainingError
from sae.training import IterableSource, initialise, train
from sae.training.recipe import Recipe, build
from sae.training.trainer import Trainer
from tests.support.quick import quick_for

D_IN, D_OUT, FEATURES, BATCH = 32, 24, 64, 512
MAP, ROWS = 105, 106


class Planted:
    """y = Σ_j ReLU(x · r_j − 1.8) w_j, of normal x and unit r_j and w_j; plus x M if `linear`.

    A feature fires on 3.6 % of the rows. No linear map gives much of its part: of ReLU(z − 1.8) the best one explains
    Φ(−1.8)² / Var = 0.13.
    """

    def __init__(self, *, linear: bool = False) -> None:
        random = np.random.default_rng([MAP, 0])
        reads, gives = random.standard_normal((FEATURES, D_IN)), random.standard_normal((FEATURES, D_OUT))
        self.reads = reads / np.linalg.norm(reads, axis=1, keepdims=True)
        self.gives = gives / np.linalg.norm(gives, axis=1, keepdims=True)
        self.linear = random.standard_normal((D_IN, D_OUT)) / D_IN**0.5 * linear

    def rows(self, count: int, stream: int = 0) -> tuple[Tensor, Tensor]:
        x = np.random.default_rng([ROWS, stream]).standard_normal((count, D_IN))
        y = np.maximum(x @ self.reads.T - 1.8, 0) @ self.gives + x @ self.linear
        return torch.from_numpy(x).float(), torch.from_numpy(y).float()

    def sources(self, batches: int = 100, *, shuffled: bool = False) -> tuple[IterableSource, IterableSource]:
        x, y = self.rows(batches * BATCH)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)) if shuffled else slice(None)
        return IterableSource(list(x.split(BATCH))), IterableSource(list(y[order].split(BATCH)))

    def found(self, dictionary: Dictionary) -> float:
        """Share of the planted features of which one feature reads and gives the directions, with cosines > 0.9."""
        read = normalize(dictionary.W_enc.T, dim=1).double() @ torch.from_numpy(self.reads).T
        given = normalize(dictionary.W_dec, dim=1).double() @ torch.from_numpy(self.gives).T
        return float((torch.minimum(read, given).amax(0) > 0.9).double().mean())

    def fvu(self, dictionary: Dictionary) -> float:
        x, y = self.rows(2048, stream=1)
        return float((y - dictionary(x)).square().sum() / (y - y.mean(0)).square().sum())


def shape(architecture: str = "topk", **settings: Any) -> DictionaryConfig:
    return DictionaryConfig.model_validate({"architecture": architecture, "d_sae": 2 * FEATURES, "k": 4, **settings})


def trained(planted: Planted, config: DictionaryConfig, *, shuffled: bool = False, steps: int = 1000) -> Dictionary:
    x, y = planted.sources(shuffled=shuffled)
    return train(x, config, TrainConfig(tokens=steps * BATCH, batch_size=BATCH), target=y)


@pytest.mark.parametrize("architecture", quick_for(["topk", "jumprelu"], ARCHITECTURES))
def test_a_planted_map_is_found(architecture: str) -> None:
    """Twice as many features as are planted, from 32 numbers to 24. ReLU divides them between its features, so that 8
    fire instead of 4."""
    planted = Planted()
    made = trained(planted, shape(architecture, k=8 if architecture == "relu" else 4))
    assert (made.d_in, made.d_out, made.frame) == (D_IN, D_OUT, Frame(d_out=D_OUT))
    assert planted.found(made) > 0.95
    assert planted.fvu(made) < 0.12


def test_nothing_is_found_if_rows_do_not_belong_together() -> None:
    planted = Planted()
    made = trained(planted, shape(), shuffled=True)
    assert planted.found(made) <= 0.02
    assert planted.fvu(made) > 0.98


def test_a_skip_connection_takes_the_linear_part_and_leaves_the_features_the_rest() -> None:
    """Without it, the features spend themselves on the linear part, and no planted one is found."""
    planted = Planted(linear=True)
    with_skip, without = (trained(planted, shape("batch_topk", skip=skip), steps=1500) for skip in (True, False))
    assert planted.found(with_skip) > 0.95
    assert planted.found(without) < 0.05
    assert planted.fvu(with_skip) < 0.01
    assert planted.fvu(without) > 0.2
    assert with_skip.W_skip is not None
    linear = torch.from_numpy(planted.linear).float()
    assert float((with_skip.W_skip - linear).norm() / linear.norm()) < 0.02


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_training_is_the_uninterrupted_one(architecture: str, tmp_path: Path) -> None:
    """Bit for bit, from step 20 of 40, with a skip connection, dead features and all that a checkpoint holds."""
    x, y = Planted().sources(8)
    settings = TrainConfig(
        tokens=40 * BATCH, batch_size=BATCH, checkpoint_every=20, keep_checkpoints=9, log_every=10,
        dead_after_tokens=4 * BATCH,
    )  # fmt: skip
    config = shape(architecture, skip=True)
    whole = train(x, config, settings, target=y, folder=tmp_path)
    saved = sae.load(tmp_path / "checkpoints" / "step-00000040")
    (tmp_path / "checkpoints" / "step-00000040" / "state.pt").unlink()
    resumed = train(x, config, settings, target=y, folder=tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40]
    for (name, ours), theirs, third in zip(
        resumed.named_parameters(), whole.parameters(), saved.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs) and torch.equal(ours, third), name
    assert bool(whole.W_skip.any())  # type: ignore[union-attr]
    assert saved.frame == Frame(skip=True, d_out=D_OUT)


def test_a_checkpoint_is_not_resumed_with_another_setting_of_skip(tmp_path: Path) -> None:
    x, y = Planted().sources(8)
    settings = TrainConfig(tokens=2 * BATCH, batch_size=BATCH, checkpoint_every=1)
    train(x, shape(), settings, target=y, folder=tmp_path)
    with pytest.raises(TrainingError, match=r"made with skip=False, now True; choose another run folder"):
        train(x, shape(skip=True), settings, target=y, folder=tmp_path)


def test_an_autoencoder_has_no_skip_connection() -> None:
    x, _ = Planted().sources(8)
    with pytest.raises(ConfigError, match=r"skip=true: an autoencoder would .* dictionary.gives .*target=\), or take"):
        train(x, shape(skip=True), TrainConfig(tokens=BATCH, batch_size=BATCH))


def test_decoder_rows_begin_as_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with a loop over features in NumPy; a few features at a time."""
    monkeypatch.setattr(initialise, "_FEATURES", 50)
    x, y = Planted(linear=True).rows(256)
    made = build(shape("relu", skip=True), D_IN, D_OUT)
    initialise.initialise_(made, x, torch.Generator().manual_seed(3), y)
    torch.testing.assert_close(made.W_enc.norm(dim=0), torch.ones(2 * FEATURES))
    assert not bool(made.b_enc.any()) and made.W_skip is not None and not bool(made.W_skip.any())
    torch.testing.assert_close(made.b_dec.data, initialise.geometric_median(y))
    targets, encoder = y.double().numpy(), made.W_enc.detach().numpy()
    for j in range(2 * FEATURES):
        strongest = np.argsort(-(x.numpy() @ encoder[:, j]), kind="stable")[:16]
        row = (targets[strongest] - targets.mean(0)).mean(0)
        assert made.W_dec[j].tolist() == pytest.approx((row / np.linalg.norm(row)).tolist(), abs=1e-5)


@pytest.mark.parametrize("rows", [1, 5])
def test_few_or_equal_rows_give_random_decoder_rows_of_norm_1(rows: int) -> None:
    made = build(shape(), D_IN, D_OUT)
    initialise.initialise_(made, torch.ones(rows, D_IN), torch.Generator().manual_seed(3), torch.ones(rows, D_OUT))
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(2 * FEATURES))
    assert len(made.W_dec.detach().unique(dim=0)) == 2 * FEATURES


@pytest.mark.parametrize("center", [False, True])
def test_step_1_sees_both_sides_around_their_means(center: bool) -> None:
    """Constants of a thousand on both sides: features fire as without, and the error of b_dec alone is the variance."""
    x, y = Planted().rows(8 * BATCH)
    settings = TrainConfig(tokens=BATCH, batch_size=BATCH, lr=1e-12, center=center, initial_b_dec="mean")
    near, far = (
        train(
            IterableSource(list((x + shift).split(BATCH))), shape("relu", skip=True), settings,
            target=IterableSource(list((y - shift).split(BATCH))),
        )
        for shift in (0.0, 1000.0)
    )  # fmt: skip
    codes = near.encode(x[:BATCH])
    assert bool((codes > 0).any())
    torch.testing.assert_close(far.encode(x[:BATCH] + 1000), codes, rtol=0, atol=2e-3 * float(codes.max()))
    torch.testing.assert_close(far.b_dec, near.b_dec - 1000, rtol=1e-4, atol=0)


def test_the_l0_penalty_is_relative_to_the_width_of_the_target(tmp_path: Path) -> None:
    """E‖y − E y‖² = d_out in training, which is what the penalty stands beside."""
    x, y = Planted().sources(8)
    settings = TrainConfig(tokens=8 * BATCH, batch_size=BATCH, log_every=1, sparsity_warmup_fraction=0)
    train(x, shape("jumprelu"), settings, target=y, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["sparsity_weight"] for line in lines} == {float(D_OUT)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("start_has_skip", [False, True])
def test_training_starts_from_a_transcoder(architecture: str, start_has_skip: bool) -> None:
    """One step with a rate of almost 0 gives back the function that it started from."""
    x, y = Planted(linear=True).sources(8)
    start = train(
        x, shape(architecture, skip=start_has_skip), TrainConfig(tokens=8 * BATCH, batch_size=BATCH), target=y
    )
    settings = TrainConfig(tokens=BATCH, batch_size=BATCH, lr=1e-12)
    made = train(x, shape(architecture, skip=True), settings, target=y, start=start)
    rows, _ = Planted().rows(64, stream=2)
    if "threshold" in dict(start.named_parameters()) and architecture != "jumprelu":
        made.get_parameter("threshold").copy_(start.get_parameter("threshold"))  # training sets it anew
    torch.testing.assert_close(made(rows), start(rows), rtol=1e-4, atol=1e-4)
    assert made.W_skip is not None and bool(made.W_skip.norm() > 0.1) == start_has_skip


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_training_starts_from_another_architecture_s_transcoder(architecture: str) -> None:
    """Weights are those of the start, up to the scales that folding undoes; the skip connection too."""
    x, y = Planted(linear=True).sources(8)
    start = train(x, shape(architecture, skip=True), TrainConfig(tokens=8 * BATCH, batch_size=BATCH), target=y)
    settings = TrainConfig(tokens=BATCH, batch_size=BATCH, lr=1e-12)
    made = train(x, shape("batch_topk", skip=True), settings, target=y, start=start)
    for name in ("W_dec", "b_dec", "W_skip"):
        torch.testing.assert_close(made.get_parameter(name), start.get_parameter(name), rtol=1e-4, atol=1e-5)
    rows, features = start.magnitude_encoder(start.W_enc.T, slice(None))
    torch.testing.assert_close(made.W_enc.T, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.b_enc, features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_an_sae_may_be_the_start_of_a_transcoder_and_the_reverse(skip: bool) -> None:
    """Equal widths: b_dec moves out of the encoder's input, or into it, without changing anything."""
    x, _ = Planted().rows(8 * BATCH)
    source = [part + 3 for part in x.split(BATCH)]
    settings = TrainConfig(tokens=8 * BATCH, batch_size=BATCH)
    autoencoder = train(IterableSource(source), shape(), settings)
    one = TrainConfig(tokens=BATCH, batch_size=BATCH, lr=1e-12)
    target = [part.flip(1) for part in source]
    made = train(IterableSource(source), shape(skip=skip), one, target=IterableSource(target), start=autoencoder)
    assert made.frame == Frame(skip=skip, d_out=D_IN)
    torch.testing.assert_close(made(source[0]), autoencoder(source[0]), rtol=1e-4, atol=1e-4)
    if skip:
        with pytest.raises(ConfigError, match=r"has skip=True, the new one has no W_skip: choose another"):
            train(IterableSource(source), shape(), one, start=made)
        with pytest.raises(ConfigError, match=r"the new one has no W_skip: set dictionary.skip=true, or"):
            train(IterableSource(source), shape(), one, target=IterableSource(target), start=made)
    else:
        again = train(IterableSource(source), shape(), one, start=made)
        torch.testing.assert_close(again(source[0]), autoencoder(source[0]), rtol=1e-4, atol=1e-4)


def test_a_start_in_bfloat16_is_converted_before_its_bias_is_moved() -> None:
    x, _ = Planted().rows(8 * BATCH)
    source = IterableSource([part + 3 for part in x.split(BATCH)])
    start = train(source, shape("relu"), TrainConfig(tokens=8 * BATCH, batch_size=BATCH)).to(torch.bfloat16)
    one = TrainConfig(tokens=BATCH, batch_size=BATCH, lr=1e-12)
    target = IterableSource([(part + 3).flip(1) for part in x.split(BATCH)])
    made, exact = train(source, shape("relu"), one, target=target, start=start), start.float()
    rows = x[:BATCH] + 3
    torch.testing.assert_close(made(rows), exact(rows), rtol=1e-4, atol=1e-4)


def test_starts_of_other_widths_say_what_can_be_set() -> None:
    x, y = Planted().sources(1)
    for d_in, d_sae, way_out in ((D_IN + 1, 128, "hook points of these widths"), (D_IN, 7, "dictionary.d_sae=7")):
        start = build(DictionaryConfig(d_sae=d_sae, k=4), d_in, D_OUT)
        with pytest.raises(ConfigError, match=rf"choose another train.start_from, or set {way_out}"):
            train(x, DictionaryConfig(d_sae=128, k=4), TrainConfig(tokens=BATCH), target=y, start=start)


def test_a_skip_connection_that_would_stay_0_is_refused() -> None:
    x, y = Planted(linear=True).sources(8)
    frozen = TrainConfig(tokens=BATCH, batch_size=BATCH, freeze=("W_skip",))
    with pytest.raises(ConfigError, match=r"train.freeze=\[W_skip\]: without a dictionary to start from it stays 0"):
        train(x, shape(skip=True), frozen, target=y)
    start = train(x, shape(skip=True), TrainConfig(tokens=8 * BATCH, batch_size=BATCH), target=y)
    made = train(x, shape(skip=True), frozen, target=y, start=start)
    torch.testing.assert_close(made.W_skip, start.W_skip)


@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_the_first_weight_is_that_of_what_features_find_in_their_targets(architecture: str) -> None:
    """A decoder that is the encoder, and targets of a third of the input: a third of an SAE's."""
    x, _ = Planted().rows(BATCH)
    made = build(DictionaryConfig(architecture=architecture, d_sae=64, k=4), D_IN, D_IN)  # type: ignore[arg-type]
    initialise.initialise_(made, x, torch.Generator().manual_seed(MAP), x / 3, 4, "zeros")
    with torch.no_grad():
        made.W_dec.copy_(made.W_enc.T)
    assert float(initialise.gain(made, x, x / 3)) == pytest.approx(1 / 3, rel=1e-5)


def test_the_state_s_size_is_that_of_all_moments() -> None:
    x, y = Planted(linear=True).sources(1)
    trainer = Trainer(
        Recipe(shape(skip=True), TrainConfig(tokens=BATCH, batch_size=BATCH, encoder_dtype="float32")), x, y, 1,
        torch.device("cpu"),
    )  # fmt: skip
    trainer.step(next(iter(x)), next(iter(y)))
    adam = trainer.optimizer.rest.state.values()
    moments = [state[name] for state in adam for name in ("exp_avg", "exp_avg_sq")]
    matrices = [part for pair in trainer.optimizer.moments for part in (pair.first, pair.second)]
    whole = [*trainer.dictionary.parameters(), *moments, *matrices]
    assert trainer.bytes() == sum(t.numel() * t.element_size() for t in whole)
