"""Runs that train while the model runs: every step of a run, resumed training, sweeps of several hook points."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae.activations.live import LivePass
from sae.config.settings import RunConfig
from sae.errors import TrainingInterrupted
from sae.model.language_model import LanguageModel
from sae.runs.pipeline import run
from sae.runs.run import Run
from sae.runs.sweeping import sweep
from sae.runs.verification import verify

READS, GIVES = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"
TinyConfig = Callable[..., RunConfig]


def settings(**more: Any) -> dict[str, Any]:
    return {
        "data__tokens": 2000, "harvest__live": True, "harvest__sample_tokens": 500, "train__tokens": 4000,
        "evaluation__tokens": 64, "features__tokens": 512, **more,
    }  # fmt: skip


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.folder / "dictionary" / "weights.safetensors")


def test_a_live_run_takes_every_step_and_stores_a_sample(tiny_config: TinyConfig) -> None:
    config = tiny_config(**settings())
    finished = run(config)
    assert finished.is_evaluated()
    assert finished.features().info["tokens"] == 480  # the rest of 512 are first positions
    stored = sorted(path.name for path in (config.cache_folder / READS).iterdir())
    assert stored == [f"held_out-0000{n}.safetensors" for n in (0, 1)] + [
        f"train-{n:05d}.safetensors" for n in (0, 4, 8, 12)
    ]
    assert verify(config.folder)[1] == []
    assert run(config).folder == finished.folder  # nothing is trained again


class _Notes:
    """Progress that keeps what stands beside a stage."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, str]] = []

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def beside(self, stage: str, text: str) -> None:
        self.notes.append((stage, text))

    def announce(self, text: str) -> None: ...


def test_progress_says_that_the_pool_is_filled(tiny_config: TinyConfig) -> None:
    notes = _Notes()
    started = Run(tiny_config(**settings(train__tokens=64)), notes)
    started.harvest()
    started.train()
    assert notes.notes[0][0] == "train"
    assert notes.notes[0][1].startswith("fills the pool: ")
    assert ("train", "fills the pool: 100%") in notes.notes


def test_a_transcoder_is_trained_live(tiny_config: TinyConfig) -> None:
    sides = {"dictionary__reads": READS, "dictionary__gives": GIVES}
    finished = run(tiny_config(**settings(harvest__hooks=[READS, GIVES], **sides)), features=False)
    assert (finished.dictionary().origin.reads.hook, finished.dictionary().origin.gives.hook) == (READS, GIVES)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu"])
def test_training_stopped_while_the_pool_is_filled_resumes_to_the_same_bits(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, architecture: str
) -> None:
    whole = tiny_config(**settings(out=str(tmp_path / "whole"), dictionary__architecture=architecture))
    run(whole, features=False)
    config = tiny_config(**settings(dictionary__architecture=architecture))
    Run(config).harvest()
    forward, passed = LanguageModel.activations, 0

    def interrupting(self: LanguageModel, tokens: torch.Tensor, hooks: Any) -> dict[str, torch.Tensor]:
        nonlocal passed
        passed += tokens.numel()
        if 1000 <= passed < 1000 + tokens.numel():
            signal.raise_signal(signal.SIGINT)
        return forward(self, tokens, hooks)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "activations", interrupting)
        with pytest.raises(TrainingInterrupted, match="run the same command again to continue"):
            Run(config).train()
    passed_before = passed
    assert passed_before < 1300, "it stopped within the pool"
    Run(config).train()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(config)[name]), name


def test_one_pass_of_the_model_trains_every_dictionary_of_a_sweep(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[LivePass] = []
    create = LivePass.__init__

    def counted(self: LivePass, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        passes.append(self)

    monkeypatch.setattr(LivePass, "__init__", counted)
    seen = 0
    fill = LivePass.contexts

    def contexts(self: LivePass, plan: Any) -> Any:
        nonlocal seen
        for tokens, rows in fill(self, plan):
            seen += tokens.numel()
            yield tokens, rows

    monkeypatch.setattr(LivePass, "contexts", contexts)
    chosen = {"dictionary": {"reads": [READS, GIVES], "k": [4, 8]}}
    one_epoch = settings(harvest__hooks=[READS, GIVES], sweep=chosen, train__tokens=None, train__pool_tokens=5000)
    result = sweep(tiny_config(**one_epoch))
    assert len(result.points) == 4
    assert seen == 2000
    alone = tiny_config(**{**one_epoch, "sweep": {}, "out": str(Path(result.folder).parent / "alone")},
                        dictionary__reads=GIVES, dictionary__k=8)  # fmt: skip
    run(alone, features=False)
    name = next(name for name in result.points if name.startswith(GIVES) and name.endswith("k8"))
    for key, tensor in weights(alone).items():
        assert torch.equal(tensor, result.dictionary(name).state_dict().get(key, tensor)), key
