"""A training that began before streams had versions ends as it would have ended then, bit for bit."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae.activations import ActivationCache
from sae.activations.loader import ActivationLoader
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.errors import TrainingError
from sae.files.writing import write_bytes
from sae.training import Recipe, TrainingInterrupted, train, train_all
from sae.training.checkpoint import STATE_FILE, list_checkpoints

HOOK = "blocks.0.hook_resid_pre"
STEPS, BATCH = 60, 16
SHAPE = DictionaryConfig(d_sae=24, k=2)
SETTINGS = TrainConfig(tokens=STEPS * BATCH, batch_size=BATCH, log_every=10, checkpoint_every=30)


@pytest.fixture
def cache(write_cache: Callable[..., ActivationCache]) -> ActivationCache:
    generator = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(640, 6, generator=generator), torch.randint(1, 5, (640,), generator=generator)
    cache = write_cache(x, tokens)
    counted = x[torch.arange(640) % 8 > 0].double()
    entry = cache.manifest.hooks[HOOK]
    entry.sum, entry.tokens = counted.sum(0).tolist(), len(counted)
    entry.sum_of_squares = float(counted.square().sum())
    return cache


def loader(cache: ActivationCache) -> ActivationLoader:
    return ActivationLoader(cache, HOOK, batch_size=BATCH, seed=1, pool_tokens=200, block_tokens=8)


def begin(cache: ActivationCache, folder: Path) -> None:
    """Train to step 30."""

    class Stop:
        def log(self, metrics: dict[str, float | int]) -> None:
            if metrics["step"] == 30:
                signal.raise_signal(signal.SIGINT)

        def close(self) -> None: ...

    with pytest.raises(TrainingInterrupted):
        train(loader(cache), SHAPE, SETTINGS, folder=folder, sinks=[Stop()])


def forget_version(folder: Path) -> None:
    """Make of a checkpoint what was written before it said which version of the streams it is of."""
    path = list_checkpoints(folder / "checkpoints")[-1] / STATE_FILE
    state = torch.load(path, weights_only=True)
    assert state["sources"]["input"].pop("streams") == 1
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def test_it_goes_on_in_the_order_it_was_begun_with(
    cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sae.activations.order.STREAMS", 1)
        whole = train(loader(cache), SHAPE, SETTINGS)
        begin(cache, tmp_path / "run")
    forget_version(tmp_path / "run")
    resumed = train(loader(cache), SHAPE, SETTINGS, folder=tmp_path / "run")
    today = train(loader(cache), SHAPE, SETTINGS)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    assert not torch.equal(whole.W_dec, today.W_dec)


def test_two_orders_are_not_read_in_one_pass(
    cache: ActivationCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(cache, tmp_path / "new")
    with monkeypatch.context() as patch:
        patch.setattr("sae.activations.order.STREAMS", 1)
        begin(cache, tmp_path / "old")
    forget_version(tmp_path / "old")
    recipes = {name: Recipe(SHAPE, SETTINGS, folder=tmp_path / name) for name in ("new", "old")}
    with pytest.raises(TrainingError, match=r"new and old: their checkpoints of step 30 have different orders of"):
        train_all({"activations": loader(cache)}, recipes)
