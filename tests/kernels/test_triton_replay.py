"""Steps with the Triton back end can be recorded once and replayed: what a CUDA graph requires, shown without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sae.config.settings import DictionaryConfig, TrainConfig
from sae.kernels import back_end, sparse
from sae.kernels.interface import Room
from sae.training import IterableSource, firing
from sae.training import optimizer as optimizer_module
from sae.training import trainer as trainer_module
from sae.training.recipe import Recipe
from sae.training.trainer import Trainer
from tests.support.quick import quick_for
from tests.support.recording import NotCapturedError, launches_recorded, recorded

ARCHITECTURES = ["topk", "batch_topk", "matryoshka", "relu", "gated", "jumprelu"]
WITH_ROOM = ["relu", "gated", "jumprelu"]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's launches are recorded")


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sparse, optimizer_module):
        monkeypatch.setattr(module, "kernels_for", lambda weights: back_end("triton"))
    monkeypatch.setattr(trainer_module, "is_replayable", lambda device, d_in: True)
    monkeypatch.setattr(firing, "_SMALLEST_LIST", 4)
    launches_recorded(monkeypatch)


def batches(count: int, batch: int, d_in: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, batch, d_in, generator=generator))


@pytest.mark.parametrize("has_dead", [False, True])
@pytest.mark.parametrize("case", quick_for(["topk", "jumprelu"], [*ARCHITECTURES, "relu, dense", "gated, dense"]))
def test_every_step_asks_the_same_of_the_device(case: str, has_dead: bool) -> None:
    """Two steps in a row: the same operations in the same order, with the same numbers and tensors at the same places.

    None of them waits for the device (`CAPTURED`), so that nothing which differs between the steps comes from it.
    """
    batch, d_in = 8, 8
    architecture, _, is_dense = case.partition(", ")
    data = batches(3, batch, d_in)
    config = DictionaryConfig(architecture=architecture, d_sae=72, k=3)  # type: ignore[arg-type]
    settings = TrainConfig(
        tokens=60 * batch, batch_size=batch, max_gradient_norm=1.0, dead_after_tokens=batch if has_dead else 10**6
    )
    trainer = Trainer(Recipe(config, settings), IterableSource(data), None, 60, torch.device("cpu"))
    trainer.firing.refresh_every = 1
    trainer.step(data[0], None)
    trainer.firing.refresh_every = 16
    trainer.firing.density = 1.0 if is_dense else 0.01
    trainer.step(data[1], None)
    signatures, recordings, rooms = [], [], []
    for x in data[1:]:
        data[0].copy_(x)
        trainer.prepare(data[0], None)
        with recorded() as recording:
            trainer.compute(data[0], None, Room(512, rooms.append))
        recordings.append(recording)  # what it created stays, so that no place is used twice
        signatures.append(recording.signature())
    assert len(signatures[0]) > 100
    for first, second in zip(*signatures, strict=True):
        assert first == second
    assert (len(trainer.firing.candidates) > 0) == has_dead
    assert bool(rooms) == (architecture in WITH_ROOM and not is_dense)


def test_what_waits_for_the_device_is_not_recorded() -> None:
    """The recorder's own test: it sees the ways in which Python waits, and copies from the host."""
    x = torch.tensor([1.0, 0.0])
    host = lambda: torch.tensor(1.0)  # noqa: E731
    for waiting in (x.sum().item, lambda: bool(x[0] > 0), x.nonzero, lambda: x[x > 0], x.unique, host):
        with pytest.raises(NotCapturedError), recorded():
            waiting()
    with pytest.raises(NotCapturedError), recorded():
        back_end("triton").select_above(x[None], x[:, None] @ x[None], x, x)


def test_a_recording_changes_nothing_until_it_is_replayed() -> None:
    x, total = torch.tensor([1.0, 2.0]), torch.zeros(2)
    with recorded() as recording:
        y = (x + 1) * x
        total += y
    assert total.tolist() == [0, 0]
    x.copy_(torch.tensor([3.0, 4.0]))
    recording.replay()
    recording.replay()
    assert total.tolist() == [24, 40]
