"""Batches are read ahead without a difference to what is trained on, to places, and to errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sae
from sae.errors import TrainingError
from sae.numerics.modes import present_mode
from sae.numerics.statistics import Statistics
from sae.training import BatchSource, IterableSource
from sae.training.reader import Reader
from tests.support.late_transfer import LateTransfer

D_IN, BATCH = 6, 8
CPU = torch.device("cpu")


class Counting:
    """A source of batches that are their number, all in one memory; its place is the number of those given."""

    d_in, batch_size, tokens_per_epoch = D_IN, BATCH, None
    statistics = Statistics(1, torch.zeros(D_IN), 1.0)

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", ends_after: int = 10**6) -> None:
        self.memory = torch.zeros(BATCH, D_IN, dtype=dtype, device=device)
        self.given, self.ends_after = 0, ends_after
        self.threads: list[int] = []
        self.fails: Callable[[int], None] = lambda number: None

    def __iter__(self) -> Iterator[Tensor]:
        while self.given < self.ends_after:
            self.threads.append(threading.get_ident())
            self.fails(self.given)
            self.given += 1
            yield self.memory.fill_(self.given)

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]

    def restart(self) -> None:
        self.given = 0


def reader_of(*sources: BatchSource, device: torch.device = CPU, ahead: bool = True) -> Reader:
    reader = Reader({str(n): source for n, source in enumerate(sources)}, device, present_mode(), ahead)
    reader._transfer = LateTransfer(device)
    return reader


def numbers(reader: Reader, count: int) -> list[float]:
    found = []
    for _ in range(count):
        batch = reader.next()
        assert batch is not None
        assert all(x.dtype == torch.float32 and (x == x[0, 0]).all() for x in batch.values())
        found.append(float(batch["0"][0, 0]))
    return found


def place(reader: Reader) -> int:
    recipe = sae.Recipe(sae.DictionaryConfig(d_sae=8, k=1), sae.TrainConfig(), source="0")
    return reader.places_of(recipe)["input"]["given"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sources_that_use_their_memory_again_are_read_ahead(dtype: torch.dtype) -> None:
    """Copies to the device are made as late as possible, when the source has written the next batch already."""
    source, other = Counting(dtype), Counting()
    reader = reader_of(source, other)
    with reader.reading(0, 100):
        for number in range(1, 101):
            assert numbers(reader, 1) == [number]
            assert place(reader) == number, "that of the batch trained last, not of the one read last"
    assert (source.given, other.given) == (100, 100), "nothing is read for later steps"
    assert source.threads[0] == threading.get_ident()
    assert len(set(source.threads[1:])) == 1 and source.threads[1] != source.threads[0]


def test_batches_read_for_a_threshold_come_again() -> None:
    source = Counting()
    reader = reader_of(source)
    with reader.reading(0, 20):
        assert numbers(reader, 3) == [1, 2, 3]
        assert [float(batch["0"][0, 0]) for batch in reader.look_ahead(4)] == [4, 5, 6, 7]
        assert place(reader) == 3
        assert numbers(reader, 5) == [4, 5, 6, 7, 8]
        assert place(reader) == 8
        assert numbers(reader, 12) == list(range(9, 21))
        assert [float(batch["0"][0, 0]) for batch in reader.look_ahead(2)] == [21, 22]
        assert place(reader) == 20


@pytest.mark.parametrize("ahead", [True, False])
def test_what_a_source_raises_is_raised_when_its_step_is_due(ahead: bool) -> None:
    source = Counting()

    def fails(number: int) -> None:
        if number == 5:
            raise OSError("no more")

    source.fails = fails
    reader = reader_of(source, ahead=ahead)
    with reader.reading(0, 20):
        assert numbers(reader, 5) == [1, 2, 3, 4, 5]
        assert place(reader) == 5
        with pytest.raises(OSError, match="no more"):
            reader.next()
    shorter = Counting()
    shorter.fails = fails
    reader = reader_of(shorter, ahead=ahead)
    with reader.reading(0, 5):
        assert numbers(reader, 5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("ahead", [True, False])
def test_sources_that_do_not_fit_together_are_refused_at_the_same_step(ahead: bool) -> None:
    sources = [IterableSource([torch.ones(4, 3)] * count) for count in (3, 5)]
    reader = reader_of(*sources, ahead=ahead)
    with reader.reading(0, 20):
        numbers(reader, 3)
        with pytest.raises(TrainingError, match="at step 4 0 and 1 differ in length"):
            reader.next()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_source_ends(ahead: bool) -> None:
    reader = reader_of(Counting(ends_after=3), ahead=ahead)
    with reader.reading(0, 20):
        assert numbers(reader, 3) == [1, 2, 3]
        assert reader.next() is None


def test_sources_on_the_device_are_read_by_the_caller_when_due() -> None:
    source = Counting(device="meta")
    reader = reader_of(source, device=torch.device("meta"))
    with reader.reading(0, 20):
        for number in range(1, 6):
            assert reader.next() is not None
            assert source.given == number
    assert set(source.threads) == {threading.get_ident()}


def test_a_source_that_runs_a_model_is_read_by_the_caller_when_due() -> None:
    class Stoppable(Counting):
        def stop_when(self, stopped: Callable[[], bool]) -> None: ...

    source = Stoppable()
    reader = reader_of(Counting(), source)
    with reader.reading(0, 20):
        for number in range(1, 6):
            assert numbers(reader, 1) == [number]
            assert source.given == number
    assert set(source.threads) == {threading.get_ident()}


def test_another_default_type_stays_in_the_callers_thread() -> None:
    """It holds for all threads: training would make its tensors in it."""
    torch.set_default_dtype(torch.float64)
    try:
        source = Counting()
        reader = reader_of(source)
        torch.set_default_dtype(torch.float32)
        with reader.reading(0, 20):
            assert numbers(reader, 4) == [1, 2, 3, 4]
        assert set(source.threads) == {threading.get_ident()}
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_callers_modes_apply_in_the_thread_too() -> None:
    source = Counting()
    modes: list[bool] = []
    source.fails = lambda number: modes.append(torch.is_grad_enabled())
    with torch.no_grad():
        reader = reader_of(source)
    with reader.reading(0, 20):
        numbers(reader, 4)
    assert modes[:4] == [False] * 4


def test_no_thread_uses_a_source_after_the_end() -> None:
    source, go_on = Counting(), threading.Event()
    source.fails = lambda number: None if number < 2 else (go_on.wait(10), None)[1]
    reader = reader_of(source)
    with pytest.raises(KeyboardInterrupt), reader.reading(0, 20):
        numbers(reader, 2)  # the third is being read
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt
    assert go_on.is_set()
    assert source.given == 3
    source.load_state_dict({"given": 0})
    with reader.reading(0, 3):
        assert numbers(reader, 3) == [1, 2, 3]


SHAPE = sae.DictionaryConfig(architecture="batch_topk", d_sae=32, k=2)
ROWS = torch.randn(40, 16, D_IN, generator=torch.Generator().manual_seed(0)).half()


class Stop:
    """Interrupts a training."""

    def log(self, metrics: dict[str, float | int]) -> None:
        if metrics["step"] == 30:
            raise KeyboardInterrupt

    def close(self) -> None: ...


def test_what_is_trained_ahead_is_what_is_trained_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights bit for bit, also of a training that was interrupted between two checkpoints and goes on."""
    settings = sae.TrainConfig(tokens=16 * 60, batch_size=16, log_every=10, checkpoint_every=20)
    plain = sae.train(IterableSource(list(ROWS)), SHAPE, settings, folder=tmp_path / "plain")
    made: list[Reader] = []

    def late(*given: Any) -> Reader:
        made.append(Reader(*given, ahead=True))
        made[-1]._transfer = LateTransfer()
        return made[-1]

    monkeypatch.setattr("sae.training.loop.Reader", late)
    folder = tmp_path / "ahead"
    with pytest.raises(KeyboardInterrupt):
        sae.train(IterableSource(list(ROWS)), SHAPE, settings, folder=folder, sinks=[Stop()])
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000020"]
    ahead = sae.train(IterableSource(list(ROWS)), SHAPE, settings, folder=folder)
    assert len(made) == 2
    for name, parameter in plain.state_dict().items():
        assert torch.equal(parameter, ahead.state_dict()[name]), name
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("plain", "ahead")]
    assert len(metrics[0]) == len(metrics[1]) == 6
