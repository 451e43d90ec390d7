"""On a GPU: the same losses as on the CPU, and no step that waits for the device."""

from __future__ import annotations

import pytest
import torch

from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.training import IterableSource, train, train_all
from sae.training.recipe import Recipe
from sae.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

D_IN, D_SAE, K, BATCH = 64, 1024, 8, 256


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(300, D_IN, generator=generator), dim=1)
    codes = (torch.rand(count, BATCH, 300, generator=generator) < 0.02) * torch.rand(count, BATCH, 300)
    return list(codes @ directions)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_gpu_s_loss_curve_is_the_cpu_s(architecture: str) -> None:
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    settings = TrainConfig(tokens=50 * BATCH, batch_size=BATCH, log_every=1, lr=1e-3, encoder_dtype="float32")
    curves: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for device, curve in curves.items():

        def note(done: int, of: int, metrics: dict[str, float | int], curve: list[float] = curve) -> None:
            curve.append(float(metrics["mse"]))

        train(IterableSource(batches(10)), shape, settings, device=device, progress=note)
    assert curves["cuda"] == pytest.approx(curves["cpu"], rel=1e-3)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_bfloat16_products_follow_the_float32_curve(architecture: str) -> None:
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    curves: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for products, curve in curves.items():
        settings = TrainConfig(tokens=50 * BATCH, batch_size=BATCH, log_every=1, lr=1e-3, encoder_dtype=products)  # type: ignore[arg-type]

        def note(done: int, of: int, metrics: dict[str, float | int], curve: list[float] = curve) -> None:
            curve.append(float(metrics["mse"]))

        train(IterableSource(batches(10)), shape, settings, device="cuda", progress=note)
    assert curves["bfloat16"] != curves["float32"]
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=0.05)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_training_twice_gives_the_same_weights(architecture: str) -> None:
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    settings = TrainConfig(tokens=30 * BATCH, batch_size=BATCH, dead_after_tokens=2 * BATCH)
    first, second = (train(IterableSource(batches(10)), shape, settings, device="cuda") for _ in range(2))
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "matryoshka"])
def test_a_step_does_not_wait_for_the_device(architecture: str) -> None:
    """With dead features, so that AuxK takes part; between two refreshes of the firing record."""
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    settings = TrainConfig(tokens=40 * BATCH, batch_size=BATCH, dead_after_tokens=2 * BATCH)
    data = batches(4)
    run = Trainer(Recipe(shape, settings), IterableSource(data), None, 40, torch.device("cuda"))
    on_device = [x.cuda() for x in data]
    for step in range(17):
        run.step(on_device[step % 4], None)
    assert len(run.firing.candidates), "no feature is dead, so AuxK is not tested"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(10):
            run.step(on_device[step % 4], None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_replayed_steps_are_the_plain_ones(architecture: str) -> None:
    """CUDA's own graphs: the same weights, bit for bit, and no warning that steps could not be recorded."""
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    settings = TrainConfig(tokens=60 * BATCH, batch_size=BATCH, dead_after_tokens=2 * BATCH, log_every=7)
    results = []
    for is_replayed in (True, False):
        chosen = settings.model_copy(update={"cuda_graph": is_replayed})
        results.append(train(IterableSource(batches(10)), shape, chosen, device="cuda"))
    for (name, ours), theirs in zip(results[0].named_parameters(), results[1].parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_many_dictionaries_share_the_memory_of_their_graphs() -> None:
    """Each equals the one trained alone, though their recorded steps overwrite each other's memory."""
    settings = TrainConfig(tokens=40 * BATCH, batch_size=BATCH, dead_after_tokens=2 * BATCH, log_every=7)
    recipes = {
        name: Recipe(DictionaryConfig(architecture=name, d_sae=D_SAE, k=K), settings)  # type: ignore[arg-type]
        for name in ARCHITECTURES
    }
    together = train_all({"activations": IterableSource(batches(10))}, recipes, device="cuda").dictionaries
    for name, recipe in recipes.items():
        alone = train(IterableSource(batches(10)), recipe.dictionary, settings, device="cuda")
        for ours, theirs in zip(together[name].parameters(), alone.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
