"""When states are written: by steps, or by a share of the time; and what does not fit a disk is not begun."""

from __future__ import annotations

import itertools
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae.config.settings import DictionaryConfig, TrainConfig
from sae.errors import TrainingError
from sae.training import IterableSource, checkpoint, loop, train
from sae.training.checkpoint import CheckpointClock, list_checkpoints
from tests.training.test_loop import BATCH, D_SAE, K, planted

Usage = namedtuple("Usage", "total used free")


class Seconds:
    """A clock that somebody else moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def simulated(step: float, write: float, steps: int, size: int = 0) -> tuple[float, list[float]]:
    """Share of the time that writing took, and the times of the states, of a training whose steps take `step`."""
    clock = Seconds()
    begun, spent, times = clock.now, 0.0, []
    states = CheckpointClock(None, size, clock)
    for number in range(1, steps + 1):
        clock.now += step
        if states.is_due(number, last=number == steps):
            with states.writing():
                clock.now += write
                spent += write
            times.append(clock.now - begun)
    return spent / (clock.now - begun), times


@pytest.mark.parametrize("write", [0.01, 1.0, 6.0, 60.0])
@pytest.mark.parametrize("step", [0.1, 0.9, 5.0])
def test_writing_takes_a_twentieth_of_the_time_at_most(step: float, write: float) -> None:
    """The first writing is estimated from its size, at 200 MB/s, and here takes that."""
    share, times = simulated(step, write, steps=int(7200 / step), size=int(write * 200e6))
    assert share <= 0.05
    assert len(times) >= 2
    longest = max(later - earlier for earlier, later in itertools.pairwise(times))
    assert longest <= max(60, 20 * write) + write + 2 * step


@pytest.mark.parametrize("seconds", [10, 59, 100, 1000])
def test_a_short_training_is_not_held_up(seconds: int) -> None:
    assert simulated(1.0, 6.0, seconds, size=1_200_000_000)[0] <= 0.05


def test_a_slow_disk_is_noticed() -> None:
    """Ten times slower than estimated: the share falls below a twentieth again, and stays there."""
    share, times = simulated(0.1, 30.0, steps=36_000, size=600_000_000)
    assert share <= 0.05
    assert times[1] - times[0] >= 500


def test_steps_that_are_given_are_kept_to() -> None:
    states = CheckpointClock(10, 10**12, Seconds())
    assert [n for n in range(1, 26) if states.is_due(n, last=n == 25)] == [10, 20, 25]


@pytest.mark.parametrize("every", [None, 5])
def test_a_slow_writer_and_the_same_weights(every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All writing is slowed down; by time at most a twentieth goes to it, and weights do not depend on it."""
    spent, slow_down = [0.0], checkpoint.save_checkpoint

    def slow(*arguments: Any) -> Path:
        before = time.monotonic()
        time.sleep(0.05)
        path = slow_down(*arguments)
        spent[0] += time.monotonic() - before
        return path

    monkeypatch.setattr(loop, "save_checkpoint", slow)
    monkeypatch.setattr(checkpoint, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "_BYTES_PER_SECOND", 1e5)
    data, shape = planted(40), DictionaryConfig(d_sae=D_SAE, k=K)
    settings = TrainConfig(tokens=40 * BATCH, batch_size=BATCH, checkpoint_every=every)
    before = time.monotonic()
    made = train(IterableSource(data), shape, settings, folder=tmp_path / "run")
    took = time.monotonic() - before
    plain = train(IterableSource(data), shape, settings)
    assert made.W_dec.equal(plain.W_dec)
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    if every is None:
        assert spent[0] <= 0.05 * took + 0.06
    else:
        assert kept == ["step-00000035", "step-00000040"]


def test_training_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three checkpoints of weights, two moments and the dictionary, and a dictionary."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    settings = TrainConfig(tokens=4 * BATCH, batch_size=BATCH)
    data, shape = planted(4), DictionaryConfig(d_sae=D_SAE, k=K)
    with pytest.raises(
        TrainingError, match=r"disk full: .*run' need [\d.]+ GB more, 0.00 GB are free: free some space"
    ):
        train(IterableSource(data), shape, settings, folder=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_main_configuration_says_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """80.7 GB: 51 million rows of 768 bfloat16 and two int32; 3 × 604 MB of checkpoints, 151 MB of dictionary."""
    from sae.activations.space import cache_bytes
    from sae.config.file import load_config

    path = Path(__file__).parents[2] / "configs" / "gpt2-small.yaml"
    config = load_config(path)
    activations = cache_bytes(config, {config.hook: 768})
    assert activations == 51_000_000 * (768 * 2 + 8)
    weights = 4 * (2 * 768 * 24_576 + 24_576 + 768)
    training = checkpoint.training_bytes(weights, 3 * weights, config.train.keep_checkpoints)
    assert training == 13 * weights
    assert round((activations + training) / 1e9, 1) == 80.7
    text = " ".join(line.strip("# ") for line in path.read_text(encoding="utf-8").splitlines()[:4])
    assert "82 GB of disk" in text
    assert f"{activations / 1e9:.1f} GB" in text
    assert f"{training / 1e9:.1f} GB" in text


def test_a_whole_run_that_does_not_fit_is_not_begun(
    tiny_config: Callable[..., Any], command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,200 rows of 32 float32 and two int32 fit 200,000 bytes; with the checkpoints they do not."""
    import yaml

    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny_config().model_dump(mode="json")), encoding="utf-8")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 200_000))
    outcome = command("run", config)
    assert outcome.status == 1
    assert outcome.err.startswith("Error: disk full: ")
    assert (
        "and 1 more on the same disk need 0.00 GB more, 0.00 GB are free, for the activations of 1,200" in outcome.err
    )
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "run" / "activations").exists()
