"""The scale of training is that of the variance: a constant vector in the data changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sae
from sae.activations.loader import ActivationLoader
from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.errors import TrainingError
from sae.numerics.statistics import Statistics
from sae.training import IterableSource, train
from sae.training.normalisation import normalisations_of
from tests.support.evaluation_cache import make_cache
from tests.support.fake_cache import HOOK
from tests.support.planted_rows import PlantedRows, fvu
from tests.support.quick import quick_for

BATCH, ROWS, STEPS = 256, 20_480, 150
OLD = Path(__file__).parent / "checkpoints-d0ee045"
SHARES = (0.9, 0.99, 0.999)


def trained(architecture: str, rows: PlantedRows, source: object, steps: int = STEPS) -> sae.Dictionary:
    shape = DictionaryConfig(architecture=architecture, d_sae=2 * rows.d_in, k=rows.k)  # type: ignore[arg-type]
    settings = TrainConfig(tokens=steps * BATCH, batch_size=BATCH)
    return train(source, shape, settings, seed=70_000 + rows.seed)  # type: ignore[arg-type]


def score(architecture: str, rows: PlantedRows, cache: Path | None = None, steps: int = STEPS) -> float:
    if cache is None:
        source: object = IterableSource(rows.batches(ROWS // BATCH, BATCH))
    else:
        x = rows.rows(ROWS)
        tokens = torch.ones(len(x), dtype=torch.int64)
        part = (x, tokens, torch.zeros_like(tokens))
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir()
        source = ActivationLoader(make_cache(cache, part, part, shard_contexts=10_000), HOOK, batch_size=BATCH)
    return fvu(trained(architecture, rows, source, steps), rows.held_out())


@pytest.mark.parametrize("architecture", quick_for(["relu", "jumprelu"], ARCHITECTURES))
def test_a_constant_vector_changes_no_architecture(architecture: str) -> None:
    still = score(architecture, PlantedRows(0))
    assert still < 0.8
    for share in (0.99, 0.999):
        assert score(architecture, PlantedRows(0, share=share)) == pytest.approx(still, rel=0.05), share


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["memory", "cache"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_constant_vector_changes_nothing_over_five_seeds(architecture: str, kept: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache" if kept == "cache" else None
    still = np.array([score(architecture, PlantedRows(seed), cache) for seed in range(5)])
    for share in SHARES:
        moved = np.array([score(architecture, PlantedRows(seed, share=share), cache) for seed in range(5)])
        assert moved.mean() == pytest.approx(still.mean(), rel=0.05), share
        assert abs(moved.mean() - still.mean()) < 2 * still.std(ddof=1), share


def test_from_a_cache_too(tmp_path: Path) -> None:
    still, moved = (score("relu", PlantedRows(1, share=share), tmp_path / "cache") for share in (0.0, 0.99))
    assert moved == pytest.approx(still, rel=0.05)


@pytest.mark.parametrize("moved", quick_for(["both"], ["input", "target", "both"]))
def test_a_constant_vector_changes_no_transcoder(moved: str) -> None:
    """One b_dec is subtracted from what a transcoder reads and added to what it gives, wherever the two lie."""

    def transcoded(input_share: float, target_share: float) -> float:
        read, given = PlantedRows(0, share=input_share), PlantedRows(0, share=target_share)
        inputs, targets = (
            rows.batches(ROWS // BATCH, BATCH) for rows in (read, given)
        )  # fmt: skip
        targets = [x.flip(1) for x in targets]
        shape = DictionaryConfig(d_sae=64, k=4)
        settings = TrainConfig(tokens=STEPS * BATCH, batch_size=BATCH)
        made = train(IterableSource(inputs), shape, settings, target=IterableSource(targets), seed=70_000)
        y = given.held_out().flip(1).double()
        error = y - made(read.held_out()).double()
        return float(error.square().sum() / (y - y.mean(0)).square().sum())

    shares = (0.0 if moved == "target" else 0.99, 0.0 if moved == "input" else 0.99)
    assert transcoded(*shares) == pytest.approx(transcoded(0.0, 0.0), rel=0.05)


@pytest.mark.parametrize("center", [False, True])
def test_the_scale_makes_the_variance_d_in(center: bool) -> None:
    x = 3.0 * torch.from_numpy(np.random.default_rng([104, 0]).standard_normal((512, 6))).float() + 100.0
    of_input, of_target = normalisations_of(IterableSource([x]), None, center, torch.device("cpu"))
    assert of_target is None
    made = of_input(x).double()
    assert float((made - made.mean(0)).square().sum(1).mean()) == pytest.approx(6, rel=1e-4)
    assert float(made.mean()) == pytest.approx(0.0 if center else 100.0 * of_input.scale, rel=0.02, abs=1e-3)


def test_variance_is_exact_next_to_a_large_mean() -> None:
    """Values 10⁶ ± 1: E‖x‖² and ‖E x‖² agree in twelve digits, more than float32 has."""
    x = torch.tensor([[1e6 - 1], [1e6 + 1]])
    assert IterableSource([x]).statistics.variance == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_constant_has_no_variance(dtype: torch.dtype) -> None:
    mean = torch.full((3,), 0.1, dtype=dtype)
    assert Statistics(9, mean, 3 * 0.1**2).variance == 0
    with pytest.raises(TrainingError, match="all equal, so there is nothing to learn"):
        train(IterableSource([torch.full((8, 3), 0.1)] * 4), DictionaryConfig(d_sae=4, k=1), TrainConfig(tokens=32))


def old_batches() -> list[Tensor]:
    random = np.random.default_rng([20261128, 3])
    rows = random.standard_normal((40, 64, 8)) * np.linspace(0.5, 2, 8) + 6.0
    return list(torch.from_numpy(rows.astype(np.float32)))


@pytest.mark.filterwarnings("ignore::sae.files.hashes.UnhashedWarning")
@pytest.mark.parametrize("architecture", ["relu", "batch_topk", "jumprelu"])
def test_a_checkpoint_of_d0ee045_goes_on_with_its_own_scale(architecture: str, tmp_path: Path) -> None:
    """`checkpoints-d0ee045` holds step 20 of 40 and the end, both made with that commit, of data far from 0.

    Equal bits on the machine that made them; other processors sum in another order.
    """
    shutil.copytree(OLD / architecture, tmp_path, dirs_exist_ok=True)
    falling = {} if architecture == "batch_topk" else {"sparsity_warmup_fraction": 0.9}
    settings = TrainConfig.model_validate(
        {"tokens": 40 * 64, "batch_size": 64, "log_every": 10, "checkpoint_every": 20, "keep_checkpoints": 9,
         "dead_after_tokens": 640, "lr": 0.01, **falling}
    )  # fmt: skip
    shape = DictionaryConfig(architecture=architecture, d_sae=16, k=2)  # type: ignore[arg-type]
    resumed = train(IterableSource(old_batches()), shape, settings, seed=5, folder=tmp_path)
    expected = sae.load(OLD / architecture)
    assert resumed.metadata["trained"]["normalisation_scale"] == expected.metadata["trained"]["normalisation_scale"]
    for (name, ours), theirs in zip(resumed.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    anew = train(IterableSource(old_batches()), shape, settings, seed=5)
    assert not torch.allclose(anew.W_enc, expected.W_enc, rtol=1e-2)
