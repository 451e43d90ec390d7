"""The loop: it learns, normalises, resumes bit for bit, stops cleanly, and says why when it cannot go on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae
from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.dictionary.saved import weights_sha256
from sae.errors import DamagedError, TrainingError
from sae.training import IterableSource, TrainingInterrupted, train
from sae.training.checkpoint import STATE_FILE, list_checkpoints
from sae.training.traits import READERS
from tests.support.quick import quick_for
from tests.support.states import save_state

D_IN, D_SAE, K, BATCH = 16, 48, 3, 64
SHAPE = DictionaryConfig(d_sae=D_SAE, k=K)


def planted(batches: int, scale: float = 1.0, shift: float = 0.0, features: int = 24) -> list[Tensor]:
    """Samples of two of a fixed set of unit directions, with positive weights; drawn by `manual_seed(0)`."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(features, D_IN, generator=generator), dim=1)
    out = []
    for _ in range(batches):
        chosen = torch.rand(BATCH, features, generator=generator).topk(2, dim=1).indices
        active = torch.zeros(BATCH, features).scatter_(1, chosen, 1.0)
        codes = active * (0.5 + torch.rand(BATCH, features, generator=generator))
        out.append(scale * (codes @ directions + 0.01 * torch.randn(BATCH, D_IN, generator=generator)) + shift)
    return out


def settings(steps: int, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"tokens": steps * BATCH, "batch_size": BATCH, "log_every": 10, "checkpoint_every": 25,
         "dead_after_tokens": 20 * BATCH, **changes}
    )  # fmt: skip


def read_by(architecture: str, **changes: object) -> dict[str, object]:
    """Those of these settings that the architecture reads; the others would be refused."""
    return {name: v for name, v in changes.items() if architecture in READERS.get(f"train.{name}", (architecture,))}


def fvu(dictionary: sae.Dictionary, x: Tensor) -> float:
    return float((x - dictionary(x)).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize(
    ("architecture", "most"),
    [
        pytest.param("topk", 0.05, marks=pytest.mark.slow),
        pytest.param("batch_topk", 0.05, marks=pytest.mark.slow),
        ("relu", 0.25),
    ],
)
def test_training_recovers_planted_features(architecture: str, most: float) -> None:
    data = planted(100)
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    chosen = settings(800, lr=3e-3, **read_by(architecture, l1_coefficient=0.5))
    dictionary = train(IterableSource(data), shape, chosen)
    assert fvu(dictionary, torch.cat(data)) < most
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(D_SAE), atol=1e-5, rtol=0)


def test_saved_dictionary_takes_raw_activations() -> None:
    """Scaling and shifting the data must change the dictionary's units, and nothing else."""
    plain = train(IterableSource(planted(50)), SHAPE, settings(100, center=True))
    moved = train(IterableSource(planted(50, scale=37.0, shift=500.0)), SHAPE, settings(100, center=True))
    x = torch.cat(planted(5))
    torch.testing.assert_close(moved(37.0 * x + 500.0), 37.0 * plain(x) + 500.0, rtol=1e-3, atol=2e-2)
    torch.testing.assert_close(moved.encode(37.0 * x + 500.0), 37.0 * plain.encode(x), rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("architecture", quick_for(["relu", "batch_topk", "jumprelu"], ARCHITECTURES))
def test_every_setting_is_in_units_of_training(architecture: str) -> None:
    """Penalties, bandwidths, thresholds mean the same whatever the data's scale; a power of two rounds nothing."""
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    fixed = read_by(architecture, l1_coefficient=0.3, l0_coefficient=0.3, bandwidth=0.5, max_gradient_norm=1.0)
    for penalty in ({}, fixed):
        small, large = (
            train(IterableSource(planted(50, scale=scale)), shape, settings(100, **penalty)) for scale in (1.0, 32.0)
        )
        x = torch.cat(planted(5))
        assert torch.equal(large(32.0 * x), 32.0 * small(x))
        assert torch.equal(large.encode(32.0 * x), 32.0 * small.encode(x))


def test_batch_topk_has_a_threshold_from_the_first_checkpoint_on(tmp_path: Path) -> None:
    """Token by token as many features fire on average as in the batches of training, in the units of the data."""
    data = planted(20, scale=12.0)
    shape = DictionaryConfig(architecture="batch_topk", d_sae=D_SAE, k=K)
    train(IterableSource(data), shape, settings(2, checkpoint_every=1), folder=tmp_path)
    first = sae.load(list_checkpoints(tmp_path / "checkpoints")[0])
    last = train(IterableSource(data), shape, settings(300))
    assert first.metadata["trained"]["tokens"] == BATCH
    l0 = [float((dictionary.encode(torch.cat(data)) > 0).sum(1).float().mean()) for dictionary in (first, last)]
    assert l0[0] == pytest.approx(K, rel=0.5)
    assert l0[1] == pytest.approx(K, rel=0.05)


def test_bfloat16_products_leave_float32_weights_and_the_same_quality(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.kernels.products.cpu_has_bfloat16", lambda: True)
    data = planted(100)
    exact, rounded = (
        train(IterableSource(data), SHAPE, settings(250, lr=3e-3, encoder_dtype=products))
        for products in ("float32", "bfloat16")
    )
    assert rounded.W_enc.dtype is torch.float32
    assert not torch.equal(exact.W_enc, rounded.W_enc)
    assert fvu(rounded, torch.cat(data)) < 1.2 * fvu(exact, torch.cat(data)) + 0.01


def test_bfloat16_on_a_processor_without_it_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae.kernels.products.cpu_has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="no bfloat16 instructions, so float32 is faster"):
        train(IterableSource(planted(2)), SHAPE, settings(2, encoder_dtype="bfloat16"))


def test_every_checkpoint_holds_a_usable_dictionary(tmp_path: Path) -> None:
    """Each in the units of the data: on data of another scale and mean, what it would have been, in that scale."""
    chosen = settings(60, keep_checkpoints=5, center=True)
    train(IterableSource(planted(20)), SHAPE, chosen, folder=tmp_path / "plain")
    final = train(IterableSource(planted(20, scale=12.0, shift=30.0)), SHAPE, chosen, folder=tmp_path)
    checkpoints = list_checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-00000025", "step-00000050", "step-00000060"]
    x = torch.cat(planted(20))
    for path in checkpoints:
        expected = 12.0 * sae.load(tmp_path / "plain" / "checkpoints" / path.name)(x)
        torch.testing.assert_close(sae.load(path)(12.0 * x + 30.0) - 30.0, expected, rtol=1e-3, atol=1e-2)
    scores = [fvu(sae.load(path), 12.0 * x + 30.0) for path in checkpoints]
    assert scores[0] > scores[-1]
    assert all(score < 1 for score in scores)
    loaded = sae.load(checkpoints[-1])
    for (name, ours), theirs in zip(final.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    train(IterableSource(planted(20)), SHAPE, settings(100, keep_checkpoints=2), folder=tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000075", "step-00000100"]


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu"])
def test_interrupted_and_resumed_training_gives_the_same_weights(tmp_path: Path, architecture: str) -> None:
    """ReLU is stopped while its L0 falls, too."""
    shape = DictionaryConfig(architecture=architecture, d_sae=D_SAE, k=K)  # type: ignore[arg-type]
    chosen = settings(110, **read_by(architecture, sparsity_warmup_fraction=0.9))
    whole = train(IterableSource(planted(30)), shape, chosen, folder=tmp_path / "whole")

    class Stop:
        def log(self, metrics: dict[str, float | int]) -> None:
            if metrics["step"] in (30, 70):
                signal.raise_signal(signal.SIGINT)

        def close(self) -> None: ...

    for _ in range(2):
        with pytest.raises(
            TrainingInterrupted, match=r"stopped at step \d0 of 110; the state is saved in .* run the same"
        ):
            train(IterableSource(planted(30)), shape, chosen, folder=tmp_path / "parts", sinks=[Stop()])
    parts = train(IterableSource(planted(30)), shape, chosen, folder=tmp_path / "parts")
    for (name, ours), theirs in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(ours, theirs[1]), name
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 111, 10)), "the log of a resumed run has gaps or repetitions"


def test_a_checkpoint_from_before_firing_was_logged_goes_on(tmp_path: Path) -> None:
    whole = train(IterableSource(planted(30)), SHAPE, settings(40, keep_checkpoints=9), folder=tmp_path)
    *_, before_last, last = list_checkpoints(tmp_path / "checkpoints")
    shutil.rmtree(last)
    state = torch.load(before_last / STATE_FILE, weights_only=True)
    del state["firing"]["counts"], state["firing"]["tokens"]
    save_state(state, before_last / STATE_FILE)
    again = train(IterableSource(planted(30)), SHAPE, settings(40, keep_checkpoints=9), folder=tmp_path)
    assert torch.equal(again.W_dec, whole.W_dec)


SCRIPT = """
    import sys, time, torch
    from sae.training import IterableSource, train
    from tests.training.test_loop import SHAPE, planted, settings

    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.002)
                yield batch

    print("ready", flush=True)
    train(IterableSource(Slow(planted(30))), SHAPE, settings(200, checkpoint_every=7), folder=sys.argv[1])
"""


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """kill -9 at six random moments; only whole checkpoints may count."""
    whole = train(IterableSource(planted(30)), SHAPE, settings(200, checkpoint_every=7), folder=tmp_path / "whole")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    rng = random.Random(0)
    kills = 0
    for _ in range(6):
        with subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "parts")], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.02, 0.35))
            kills += process.poll() is None
            process.kill()
    assert kills >= 3, "training ended before it could be killed"
    parts = train(IterableSource(planted(30)), SHAPE, settings(200, checkpoint_every=7), folder=tmp_path / "parts")
    for (name, ours), theirs in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        assert torch.equal(ours, theirs[1]), name


@pytest.mark.parametrize("architecture", quick_for(["relu", "batch_topk"], ARCHITECTURES))
def test_two_threads_make_the_same_weights_each_time(architecture: str) -> None:
    """Enough pairs that PyTorch divides them among the threads."""
    data = list(torch.randn(6, 2048, 32, generator=torch.Generator().manual_seed(0)))
    shape = DictionaryConfig(architecture=architecture, d_sae=512, k=32)  # type: ignore[arg-type]
    chosen = TrainConfig(tokens=6 * 2048, batch_size=2048)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = [weights_sha256(train(IterableSource(data), shape, chosen)) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert len(set(made)) == 1


def test_seeds_matter_and_repeat() -> None:
    def weights(seed: int) -> Tensor:
        return train(IterableSource(planted(20)), SHAPE, settings(40), seed=seed).W_dec

    assert torch.equal(weights(1), weights(1))
    assert not torch.allclose(weights(1), weights(2), atol=0.1)


def test_metrics_are_those_of_the_batches(tmp_path: Path) -> None:
    """With learning rates of nearly nothing, the logged FVU is the initial dictionary's FVU of those batches."""
    data = planted(10)
    lines = settings(10, lr=1e-12)
    dictionary = train(IterableSource(data), SHAPE, lines, folder=tmp_path)
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    expected = sum(fvu(dictionary, batch) for batch in data) / 10
    assert metrics["fvu"] == pytest.approx(expected, rel=1e-4)
    assert metrics["l0"] == pytest.approx(
        float((dictionary.encode(torch.cat(data)) > 0).sum(1).float().mean()), rel=1e-4
    )
    assert metrics["tokens"] == 10 * BATCH


def test_nan_in_the_activations_stops_with_the_step_and_the_way_out(tmp_path: Path) -> None:
    data = planted(60)
    data[32][5, 3] = float("nan")
    source = IterableSource(data)
    with pytest.raises(TrainingError) as caught:
        train(source, SHAPE, settings(60), folder=tmp_path)
    message = str(caught.value)
    assert message.startswith(
        "NaN at step 33, batch 32 (tokens 2,048 to 2,112): the activations themselves are not finite"
    )
    assert "sae verify" in message
    assert "step-00000025" in message
    assert all(torch.isfinite(p).all() for p in sae.load(tmp_path / "checkpoints" / "step-00000025").parameters())


def test_divergence_stops_and_names_the_learning_rate() -> None:
    with pytest.raises(TrainingError, match=r"training diverged; lower train\.lr \(now 1e\+30\)"):
        train(IterableSource(planted(60)), SHAPE, settings(60, lr=1e30))


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train(IterableSource(planted(20)), SHAPE, settings(30), folder=tmp_path)
    with pytest.raises(TrainingError, match=r"made with k=3, now 5; choose another run folder"):
        train(IterableSource(planted(20)), DictionaryConfig(d_sae=D_SAE, k=5), settings(30), folder=tmp_path)


def test_a_checkpoint_with_altered_bytes_is_refused(tmp_path: Path) -> None:
    train(IterableSource(planted(20)), SHAPE, settings(30), folder=tmp_path)
    state = list_checkpoints(tmp_path / "checkpoints")[-1] / STATE_FILE
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 0x40
    state.write_bytes(content)
    with pytest.raises(DamagedError, match=r"state.pt': damaged or changed: .*; delete its checkpoint's folder, and"):
        train(IterableSource(planted(20)), SHAPE, settings(30), folder=tmp_path)
    shutil.rmtree(state.parent)
    train(IterableSource(planted(20)), SHAPE, settings(30), folder=tmp_path)


def test_fewer_tokens_than_a_batch_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"10 training tokens are fewer than one batch of 64"):
        train(IterableSource(planted(5)), SHAPE, TrainConfig(tokens=10))


def test_activations_that_are_all_zero_are_refused() -> None:
    with pytest.raises(TrainingError, match="all equal, so there is nothing to learn"):
        train(IterableSource([torch.zeros(BATCH, D_IN)] * 9), SHAPE, settings(9))


def test_activations_that_are_not_finite_are_refused_at_once() -> None:
    with pytest.raises(TrainingError, match=r"some are not finite; check a cache with 'sae verify'"):
        train(IterableSource([torch.full((BATCH, D_IN), torch.nan), *planted(9)]), SHAPE, settings(9))


def test_pure_forward_pass() -> None:
    dictionary = train(IterableSource(planted(20)), SHAPE, settings(20))
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    dictionary.train()
    dictionary(planted(1)[0])
    assert all(torch.equal(before[name], value) for name, value in dictionary.state_dict().items())
