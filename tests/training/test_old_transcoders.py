"""Trainings of transcoders that began before version 4 of their states go on as they were, and start new ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sae
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.frame import PLAIN, Frame
from sae.errors import ConfigError, TrainingError
from sae.training import IterableSource, train

OLD, VERSION_3 = (Path(__file__).parent / f"checkpoints-{commit}" for commit in ("51dc42b", "266aa39"))
KINDS = {"topk": "topk", "gated": "gated", "jumprelu-from-topk": "jumprelu"}


def batches(with_outliers: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """What the trainings of 51dc42b read, and what they gave: both far from 0."""
    random = np.random.default_rng([20261201, 7])
    x = random.standard_normal((40, 64, 8)) * np.linspace(0.5, 2, 8) + 6.0
    y = np.maximum(x[..., ::-1] - 6.0, 0) - 3.0
    x[1::4, 7] *= 300 if with_outliers else 1
    return list(torch.from_numpy(x.astype(np.float32))), list(torch.from_numpy(y.astype(np.float32)))


def trained(
    kind: str, folder: Path | None = None, start: sae.Dictionary | None = None, with_outliers: bool = False,
    **shape: Any,
) -> sae.Dictionary:  # fmt: skip
    architecture = KINDS[kind]
    falling = {} if architecture == "topk" else {"sparsity_warmup_fraction": 0.9}
    settings = TrainConfig.model_validate(
        {"tokens": 40 * 64, "batch_size": 64, "log_every": 10, "checkpoint_every": 20, "keep_checkpoints": 9,
         "dead_after_tokens": 640, "lr": 0.01, **falling}
    )  # fmt: skip
    x, y = batches(with_outliers)
    return train(
        IterableSource(x), DictionaryConfig(architecture=architecture, d_sae=16, k=2, **shape), settings,  # type: ignore[arg-type]
        target=IterableSource(y), seed=5, folder=folder, start=start,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_with_its_own_frame(kind: str, tmp_path: Path) -> None:
    """`checkpoints-51dc42b` holds step 20 of 40 and the end, made with that commit. Twice, so that what a training that
    was resumed has written is resumed too.

    Equal bits on the machine that made them; other processors sum in another order.
    """
    shutil.copytree(OLD / kind, tmp_path, dirs_exist_ok=True)
    start, expected = sae.load(OLD / "topk") if "from" in kind else None, sae.load(OLD / kind)
    for _ in range(2):
        resumed = trained(kind, tmp_path, start)
        assert resumed.frame == PLAIN
        for (name, ours), theirs in zip(resumed.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    anew = trained(kind, start=start)
    assert anew.frame == Frame(d_out=8)
    assert not torch.allclose(anew.W_enc, expected.W_enc, rtol=1e-2)


def test_one_of_version_3_leaves_out_outliers(tmp_path: Path) -> None:
    """As those of version 2, but for the outliers, which 266aa39 left out already."""
    shutil.copytree(VERSION_3 / "topk", tmp_path, dirs_exist_ok=True)
    resumed, expected = trained("topk", tmp_path, with_outliers=True), sae.load(VERSION_3 / "topk")
    assert resumed.frame == PLAIN
    for (name, ours), theirs in zip(resumed.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    assert resumed.metadata["trained"]["left_out"] == expected.metadata["trained"]["left_out"] == 10


def test_a_checkpoint_does_not_go_on_with_a_skip_connection(tmp_path: Path) -> None:
    shutil.copytree(OLD / "topk", tmp_path, dirs_exist_ok=True)
    with pytest.raises(TrainingError, match="made with skip=False, now True"):
        trained("topk", tmp_path, skip=True)


@pytest.mark.parametrize("skip", [False, True])
def test_a_new_training_starts_from_an_old_transcoder(skip: bool) -> None:
    """Step 1 with a rate of almost 0: the same function of raw activations, without b_dec before the encoder."""
    old, (x, y) = sae.load(OLD / "topk"), batches()
    settings = TrainConfig(tokens=64, batch_size=64, lr=1e-9)
    shape = DictionaryConfig(d_sae=16, k=2, skip=skip)
    new = train(IterableSource(x), shape, settings, target=IterableSource(y), start=old)
    assert new.frame == Frame(skip=skip, d_out=8)
    assert bool(old.b_dec.abs().min() > 0.1), "nothing would be seen if b_dec were subtracted"
    torch.testing.assert_close(new(x[0]), old(x[0]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"has d_sae=16 and d_in=8, d_out=8, the new one .*, d_out=4"):
        train(IterableSource(x), shape, settings, target=IterableSource([row[:, :4] for row in y]), start=old)
