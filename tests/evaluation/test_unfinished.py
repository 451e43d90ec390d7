"""An evaluation that is interrupted goes on where it was, and comes out the same to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sae
from sae.config.settings import EvaluationConfig
from sae.config.splits import HELD_OUT
from sae.errors import ConfigError
from sae.evaluation import evaluate, partial
from sae.evaluation.budget import announcement, losses_read, pca_tokens, settled, spread_contexts
from sae.evaluation.partial import FOLDER, Unfinished
from sae.runs.run import Run

STAGES = ("reconstruction", "baselines", "language model", "legacy formulas", "frozen decoder")


@pytest.fixture(scope="module")
def run_of(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes run folders with a trained dictionary, all on one cache; more than one block of held-out tokens."""
    from tests.conftest import make_tiny_config

    folder = tmp_path_factory.mktemp("runs")

    def make(name: str) -> Run:
        overrides = {
            "harvest.cache": str(folder / "cache"), "data.held_out_tokens": 3000, "data.tokens": 3000,
            "evaluation.batch_contexts": 4, "evaluation.downstream_tokens": 1000, "evaluation.baseline_tokens": 300,
            "evaluation.legacy_tokens": 700, "evaluation.frozen_decoder_tokens": 1000,
        }  # fmt: skip
        run = Run(make_tiny_config(tiny_model, text_folder, folder / name, overrides))
        run.harvest()
        run.train()
        return run

    return make


class Stopped(KeyboardInterrupt):
    """Ctrl-C at a chosen moment."""


def stop_in(stage: str, calls: int) -> Any:
    """Progress that ends the work when a stage has reported so often."""
    seen = dict.fromkeys(STAGES, 0)

    def progress(name: str, done: int, total: int) -> None:
        name = name.removeprefix("evaluate: ")
        if name in seen:
            seen[name] += 1
            if name == stage and seen[name] > calls:
                raise Stopped

    return progress


def results(run: Run) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    record = json.loads((run.folder / "eval.json").read_text())
    return {key: value for key, value in record.items() if key != "seconds"}, load_file(
        run.folder / "eval-documents.safetensors"
    )


@pytest.fixture(scope="module")
def uninterrupted(run_of: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    run = run_of("whole")
    run.evaluate()
    return results(run)


@pytest.mark.parametrize(
    ("stage", "calls"),
    [
        ("reconstruction", 1),
        ("baselines", 1),
        ("language model", 3),
        pytest.param("language model", 12, marks=pytest.mark.slow),
        pytest.param("legacy formulas", 2, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_evaluation_is_the_uninterrupted_one(
    run_of: Any, uninterrupted: Any, stage: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "EVERY", 0.0)
    run = run_of(f"stopped-{stage.replace(' ', '-')}-{calls}")
    run.progress = stop_in(stage, calls)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate()
    assert not (run.folder / "eval.json").exists()
    begun: dict[str, int] = {}
    again = Run.open(run.folder, progress=lambda name, done, total: begun.setdefault(name, done) and None)
    again.evaluate()
    assert begun[f"evaluate: {stage}"] > 0, "what was done counts as done"
    assert "evaluate: frozen decoder" not in begun or stage == "reconstruction", "it is trained once"
    record, totals = results(again)
    assert record == uninterrupted[0]
    assert totals.keys() == uninterrupted[1].keys()
    assert all(torch.equal(totals[name], uninterrupted[1][name]) for name in totals)
    assert not (run.folder / FOLDER).exists(), "nothing of it is left"


def test_what_decides_the_numbers_decides_what_is_taken_up(tmp_path: Path) -> None:
    class Sums:
        def __init__(self) -> None:
            self.value = torch.zeros(2)

        def state_dict(self) -> dict[str, torch.Tensor]:
            return {"value": self.value}

        def load_state_dict(self, state: Any) -> None:
            self.value = state["value"]

    sums = Sums()
    stage = Unfinished(tmp_path, {"weights": "a"}, every=0.0).stage("one", {"s": sums})
    sums.value += 3
    stage.step(7)
    again = Sums()
    assert Unfinished(tmp_path, {"weights": "a"}).stage("one", {"s": again}).done == 7
    assert again.value.tolist() == [3, 3]
    [file] = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert Unfinished(tmp_path, {"weights": "a"}).stage("one", {"s": Sums()}).done == 0, "a damaged file is not used"
    assert Unfinished(tmp_path, {"weights": "b"}).stage("one", {"s": Sums()}).done == 0
    assert not list(tmp_path.rglob("*.safetensors")), "what is of another evaluation is deleted"
    assert Unfinished(None, {}).stage("one", {"s": Sums()}).done == 0


def test_auto_is_a_share_of_the_cache(tiny_cache: sae.ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": 1_500_000, "held_out": 60_000}
    monkeypatch.setattr(tiny_cache.manifest, "rows", rows)
    chosen = settled(EvaluationConfig(), tiny_cache)
    assert (chosen.downstream_tokens, chosen.baseline_tokens) == (2031, 1354)
    assert (chosen.legacy_tokens, chosen.frozen_decoder_tokens) == (1015, 16_384)
    assert chosen.baseline_reconstruction_tokens == 6093
    assert pca_tokens(tiny_cache, "blocks.1.hook_resid_pre") == 48_750
    rows["train"] = 300_000_000
    large = settled(EvaluationConfig(), tiny_cache)
    assert (large.downstream_tokens, large.baseline_tokens) == (390_703, 16_384)
    assert (large.legacy_tokens, large.frozen_decoder_tokens) == (8192, 200_000)
    assert large.baseline_reconstruction_tokens == 1_172_109
    assert pca_tokens(tiny_cache, "blocks.1.hook_resid_pre") == 200_000
    rows |= {"train": 1000, "held_out": 200}
    small = settled(EvaluationConfig(), tiny_cache)
    assert (small.downstream_tokens, small.baseline_tokens, small.legacy_tokens) == (1024, 512, 512)
    assert pca_tokens(tiny_cache, "blocks.1.hook_resid_pre") == 16_384
    rows |= {"train": 16_384, "held_out": 8192}
    monkeypatch.setattr(type(tiny_cache), "context_length", 4096)
    long = settled(EvaluationConfig(), tiny_cache)
    assert (long.downstream_tokens, long.baseline_tokens, long.legacy_tokens) == (4096, 4096, 4096), "one context each"
    given = EvaluationConfig(
        downstream_tokens=None,
        baseline_tokens=7,
        legacy_tokens=0,
        frozen_decoder_tokens=5,
        baseline_reconstruction_tokens=9,
    )
    assert settled(given, tiny_cache) == given


def test_the_cost_is_said_before(tiny_cache: sae.ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 4 · 2,031 + 3 · 1,354 + 4 · 1,015 tokens go through the model."""
    rows = {"train": 1_500_000, "held_out": 60_000}
    monkeypatch.setattr(tiny_cache.manifest, "rows", rows)
    text = announcement(EvaluationConfig(), tiny_cache)
    assert text == (
        "evaluation: 60,000 held-out tokens, 2,031 of them for losses: language-model passes over about 16,246 tokens "
        "(the harvest: 1,560,000)"
    )


def test_contexts_for_losses_are_spread_over_the_split(many_documents: sae.ActivationCache) -> None:
    """246 tokens in contexts of 16: 15 whole ones and a short one."""
    settings = EvaluationConfig(downstream_tokens=64, baseline_tokens=20, batch_contexts=3)
    found = list(spread_contexts(many_documents, settings))
    everything = [batch.tokens for batch in many_documents.contexts(HELD_OUT, batch_contexts=1)]
    assert len(everything) == 16
    assert sum(len(batch.tokens) for batch, _ in found) == 4
    assert losses_read(settings, many_documents) == 64
    chosen = {number for number, one in enumerate(everything) for batch, _ in found for row in batch.tokens
              if one.shape[1] == len(row) and torch.equal(one[0], row)}  # fmt: skip
    assert chosen == {0, 4, 8, 12}
    of_baselines = [batch.tokens for batch, is_first in found if is_first]
    assert sum(map(len, of_baselines)) == 2
    whole = EvaluationConfig(downstream_tokens=None, baseline_tokens=None)
    assert sum(batch.tokens.numel() for batch, _ in spread_contexts(many_documents, whole)) == 246


def test_numbers_of_tokens_that_cannot_be_are_refused() -> None:
    refused = {
        "downstream_tokens": 0,
        "baseline_tokens": "some",
        "baseline_reconstruction_tokens": 0,
        "legacy_tokens": -1,
    }
    for name, value in refused.items():
        with pytest.raises(ConfigError, match=rf"setting evaluation\.{name}={value!r}: expected a number"):
            EvaluationConfig.model_validate({name: value})
    with pytest.raises(ConfigError, match="legacy_tokens=None: expected a number 0 or more, or auto"):
        EvaluationConfig.model_validate({"legacy_tokens": None})


def test_a_dictionary_without_a_hash_keeps_nothing(tiny_cache: sae.ActivationCache, tmp_path: Path) -> None:
    class Half:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu()

        def decode(self, features: torch.Tensor) -> torch.Tensor:
            return 0.5 * features

    report = evaluate(Half(), tiny_cache, hook="blocks.1.hook_resid_pre")
    assert report.settings == EvaluationConfig()
