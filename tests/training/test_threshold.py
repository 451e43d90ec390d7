"""The threshold of BatchTopK and Matryoshka: k features fire at every snapshot, on rows that were not trained on."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.config.splits import HELD_OUT
from sae.errors import TrainingError
from sae.runs.run import Run
from sae.training import IterableSource, TrainingInterrupted, train
from sae.training.checkpoint import list_checkpoints
from tests.support.planted_rows import PlantedRows

ARCHITECTURES = ("batch_topk", "matryoshka")
BATCH, K = 256, 4
ROWS = PlantedRows(11, k=K)


def snapshots(steps: int, batch: int) -> tuple[int, ...]:
    """After every twentieth."""
    return tuple(round(steps * part / 20) * batch for part in range(1, 21))


def l0s(folder: Path, x: Tensor) -> list[float]:
    """By the thresholds of all snapshots, oldest first."""
    saved = sorted((folder / "snapshots").iterdir())
    return [float((sae.load(path).encode(x) > 0).sum(1).double().mean()) for path in saved]


def trained(
    architecture: str, steps: int, folder: Path, *, batches: int = 100, batch: int = BATCH, **changes: object
) -> sae.Dictionary:
    shape = DictionaryConfig(architecture=architecture, d_sae=64, k=K)  # type: ignore[arg-type]
    settings = TrainConfig.model_validate(
        {"tokens": steps * batch, "batch_size": batch, "snapshots": snapshots(steps, batch), **changes}
    )
    return train(IterableSource(ROWS.batches(batches, batch)), shape, settings, seed=70_000, folder=folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "steps", [100, pytest.param(400, marks=pytest.mark.slow), pytest.param(1400, marks=pytest.mark.slow)]
)
def test_l0_by_threshold_is_k_at_every_twentieth_of_planted_rows(architecture: str, steps: int, tmp_path: Path) -> None:
    trained(architecture, steps, tmp_path)
    found = l0s(tmp_path, ROWS.held_out(8192))
    print(architecture, steps, [round(l0 / K, 3) for l0 in found])
    assert len(found) == 20
    assert found[1:] == pytest.approx([K] * 19, rel=0.05)


def test_rows_are_enough_in_small_batches_too(tmp_path: Path) -> None:
    """Of one batch of 16 rows the threshold would be off by a fifth."""
    trained("batch_topk", 200, tmp_path, batches=400, batch=16)
    assert l0s(tmp_path, ROWS.held_out(8192))[1:] == pytest.approx([K] * 19, rel=0.05)


@pytest.mark.parametrize("batch", [64, 2048])
def test_resumed_thresholds_are_those_of_a_training_in_one_go(batch: int, tmp_path: Path) -> None:
    """Snapshots every step, with 64 batches read ahead or two; the interruption lies between two of them."""
    every = tuple(step * batch for step in range(1, 13))
    whole = trained("batch_topk", 12, tmp_path / "whole", batches=40, batch=batch, snapshots=every)

    class Stop:
        def log(self, metrics: dict[str, float | int]) -> None:
            if metrics["step"] == 5:
                signal.raise_signal(signal.SIGINT)

        def close(self) -> None: ...

    shape = DictionaryConfig(architecture="batch_topk", d_sae=64, k=K)
    settings = TrainConfig(tokens=12 * batch, batch_size=batch, snapshots=every, log_every=5)
    data = ROWS.batches(40, batch)
    with pytest.raises(TrainingInterrupted):
        train(IterableSource(data), shape, settings, seed=70_000, folder=tmp_path / "parts", sinks=[Stop()])
    parts = train(IterableSource(data), shape, settings, seed=70_000, folder=tmp_path / "parts")
    for (name, ours), theirs in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    for path in sorted((tmp_path / "whole" / "snapshots").iterdir()):
        resumed = sae.load(tmp_path / "parts" / "snapshots" / path.name)
        assert torch.equal(sae.load(path).get_parameter("threshold"), resumed.get_parameter("threshold"))
    again = train(IterableSource(data), shape, settings, seed=70_000, folder=tmp_path / "parts")
    assert torch.equal(again.get_parameter("threshold"), whole.get_parameter("threshold"))


def test_what_is_logged_is_what_is_saved(tmp_path: Path) -> None:
    trained("batch_topk", 40, tmp_path, log_every=10, checkpoint_every=10, keep_checkpoints=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line, path in zip(lines, list_checkpoints(tmp_path / "checkpoints"), strict=True):
        saved = sae.load(path)
        scale = saved.metadata["trained"]["normalisation_scale"]
        assert line["threshold"] == pytest.approx(float(saved.get_parameter("threshold")) * scale, rel=1e-5)


def test_reading_ahead_changes_nothing_else(tmp_path: Path) -> None:
    """The weights are those of a training that never looks ahead; an iterable may use one buffer for all batches."""
    data = ROWS.batches(20, BATCH)

    class OneBuffer:
        def __iter__(self) -> Iterator[Tensor]:
            buffer = torch.empty_like(data[0])
            for batch in data:
                yield buffer.copy_(batch)

    shape = DictionaryConfig(architecture="batch_topk", d_sae=64, k=K)
    first = IterableSource(data)
    source = IterableSource(OneBuffer())
    source.statistics = first.statistics  # of the buffer they would be those of the last batch
    rare, often = (
        train(made, shape, TrainConfig(tokens=20 * BATCH, batch_size=BATCH, log_every=log_every), seed=70_000)
        for made, log_every in ((first, 1000), (source, 3))
    )
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(rare.get_parameter(name), often.get_parameter(name)), name


class Ending:
    """A source of a few batches, after which there is nothing, or an error."""

    d_in, batch_size, tokens_per_epoch = 32, BATCH, None

    def __init__(self, batches: int, error: Exception | None = None) -> None:
        self.data, self.error, self.place = ROWS.batches(batches, BATCH), error, 0
        self.statistics = IterableSource(self.data).statistics

    def __iter__(self) -> Iterator[Tensor]:
        while self.place < len(self.data):
            self.place += 1
            yield self.data[self.place - 1]
        if self.error is not None:
            raise self.error

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]

    def restart(self) -> None:
        self.place = 0


def test_a_source_may_end_with_the_training() -> None:
    shape = DictionaryConfig(architecture="batch_topk", d_sae=64, k=K)
    made = train(Ending(10), shape, TrainConfig(tokens=10 * BATCH, batch_size=BATCH))
    l0 = float((made.encode(ROWS.held_out(8192)) > 0).sum(1).double().mean())
    assert l0 == pytest.approx(K, rel=0.15)  # of one batch


def test_a_source_may_break_off_after_the_last_step(tmp_path: Path) -> None:
    """What nobody needs is no error, of whatever kind."""
    shape = DictionaryConfig(architecture="batch_topk", d_sae=64, k=K)
    settings = TrainConfig(tokens=10 * BATCH, batch_size=BATCH, log_every=1)
    train(Ending(10, OSError("stream closed")), shape, settings, folder=tmp_path)
    assert list_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000010"
    with pytest.raises(OSError, match="stream closed"):
        longer = settings.model_copy(update={"tokens": 11 * BATCH})
        train(Ending(10, OSError("stream closed")), shape, longer)


def test_an_error_in_what_comes_next_is_raised_when_its_step_is_due(tmp_path: Path) -> None:
    """All steps before are taken and saved."""
    shape = DictionaryConfig(architecture="batch_topk", d_sae=64, k=K)
    settings = TrainConfig(tokens=20 * BATCH, batch_size=BATCH, checkpoint_every=3)
    with pytest.raises(TrainingError, match="row 7 is damaged"):
        train(Ending(10, TrainingError("row 7 is damaged")), shape, settings, folder=tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000006", "step-00000009"]


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory: pytest.TempPathFactory) -> sae.ActivationCache:
    """Activations of the demo model."""
    folder = tmp_path_factory.mktemp("demo")
    return Run(sae.load_config("configs/quickstart.yaml", [f"out={folder}", "data.tokens=200000"])).harvest()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", [100, 400, 1400])
def test_l0_by_threshold_is_k_at_every_twentieth_of_the_demo_model_s_rows(
    architecture: str, steps: int, tmp_path: Path, demo_cache: sae.ActivationCache
) -> None:
    """Rows not trained on: later ones of the same pass, and those of documents that were held out.

    More features fire on text that nothing was learned from, the more so the less there was to learn (docs/log.md).
    """
    [hook] = demo_cache.hooks
    batch, shape = 128, DictionaryConfig(architecture=architecture, d_sae=512, k=16)  # type: ignore[arg-type]
    settings = TrainConfig(tokens=steps * batch, batch_size=batch, snapshots=snapshots(steps, batch))
    train(sae.ActivationLoader(demo_cache, hook, batch_size=batch), shape, settings, folder=tmp_path)
    later = sae.ActivationLoader(demo_cache, hook, batch_size=batch)
    assert later.tokens_per_epoch is not None and later.tokens_per_epoch > (steps + 64) * batch
    held_out = sae.ActivationLoader(demo_cache, hook, batch_size=batch, split=HELD_OUT)
    rows = {"later": itertools.islice(later, steps, steps + 64), "held out": itertools.islice(held_out, 128)}
    for name, most in (("later", 0.05), ("held out", 0.08)):
        found = l0s(tmp_path, torch.cat(list(rows[name])))
        print(architecture, steps, name, [round(l0 / 16, 3) for l0 in found])
        assert found[1:] == pytest.approx([16] * 19, rel=most), name
