"""What training logs: every term of the loss with its weight, as means over the steps between two lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sae.architectures import ARCHITECTURES
from sae.files.writing import write_bytes
from sae.training import IterableSource, train
from sae.training.meter import Meter
from sae.training.objectives import Losses
from sae.training.sinks import JsonLines
from tests.support.states import save_state
from tests.training.test_control import raw, shape
from tests.training.test_loop import BATCH, D_IN, D_SAE, settings


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_log_has_every_term_of_the_loss_and_its_weight(architecture: str) -> None:
    lines: list[dict[str, float]] = []
    chosen = settings(120, log_every=1, dead_after_tokens=2 * BATCH, aux_coefficient=0.3, max_gradient_norm=10.0)
    train(
        IterableSource(raw(20)), shape(architecture), chosen,
        progress=lambda done, of, metrics: lines.append({k: float(v) for k, v in metrics.items()}),
    )  # fmt: skip
    for line in lines:
        weight = line.get("sparsity_weight", 0.0)
        penalty = line.get("l1", line.get("l0_penalty", 0.0))
        revived = 0.3 * (line.get("aux", 0.0) + line.get("revival", 0.0))
        error = line["mse_prefixes" if architecture == "matryoshka" else "mse"] + line.get("gate_mse", 0.0)
        assert line["loss"] == pytest.approx(error + weight * penalty, rel=1e-5), line["step"]
        assert line["objective"] == pytest.approx(error + weight * penalty + revived, rel=1e-5), line["step"]
    last = lines[-1]
    assert ("sparsity_weight" in last) == (architecture in ("relu", "gated", "jumprelu"))
    assert ("threshold" in last) == (architecture in ("batch_topk", "matryoshka"))
    if architecture == "jumprelu":
        assert last["sparsity_weight"] == D_IN, "the default weight of (L0 / k − 1)²"
    assert last["gradient_norm"] > 0
    assert any("revival" in line for line in lines) == (architecture in ("relu", "gated"))
    assert any("aux" in line for line in lines) == (architecture != "relu")


def test_logged_numbers_are_means_of_the_steps_between() -> None:
    """But for the threshold and the learning rate, which are those of the step."""

    def logged(log_every: int) -> list[dict[str, float]]:
        found: list[dict[str, float]] = []
        train(
            IterableSource(raw(20)), shape("batch_topk"), settings(8, log_every=log_every, max_gradient_norm=1.0),
            progress=lambda done, of, metrics: found.append({name: float(value) for name, value in metrics.items()}),
        )  # fmt: skip
        return found

    single, double = logged(1), logged(2)
    for line, first, second in zip(double, single[::2], single[1::2], strict=True):
        for name in ("loss", "objective", "mse", "fvu", "l0", "gradient_norm"):
            assert line[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-5), name
        assert first["mse"] != second["mse"]
        assert (line["threshold"], line["lr"]) == (second["threshold"], second["lr"])


def test_a_term_that_some_steps_lack_is_nothing_in_them() -> None:
    """So that what is logged of terms of constant weight adds up over any interval."""
    meter, one = Meter(BATCH), torch.ones(())
    nothing = torch.zeros(D_SAE)
    meter.add(Losses(2 * one, {"mse": 2 * one}, nothing, one), one)
    meter.add(Losses(5 * one, {"mse": 2 * one, "aux": 3 * one}, nothing, one, revived=3 * one), one)
    found = meter.read()
    assert (found["loss"], found["objective"], found["mse"], found["aux"]) == (2.0, 3.5, 2.0, 1.5)


def logged_lines(folder: Path) -> list[dict[str, float]]:
    """Without the time they took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "relu"])
def test_a_resumed_training_logs_the_lines_of_an_uninterrupted_one(architecture: str, tmp_path: Path) -> None:
    """Checkpoints at steps 13 and 26, lines every 10: the first line after each averages steps of two processes."""
    chosen = settings(40, log_every=10, checkpoint_every=13, keep_checkpoints=9)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(IterableSource(raw(20)), shape(architecture), chosen, folder=whole)
    shutil.copytree(whole, resumed)
    for step in (26, 39, 40):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    train(IterableSource(raw(20)), shape(architecture), chosen, folder=resumed)
    lines = logged_lines(whole)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert logged_lines(resumed) == lines


def test_a_checkpoint_without_sums_is_read(tmp_path: Path) -> None:
    """As older versions wrote them."""
    chosen = settings(20, log_every=10, checkpoint_every=5, keep_checkpoints=9)
    train(IterableSource(raw(20)), shape("topk"), chosen, folder=tmp_path)
    for step in (10, 15, 20):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    path = tmp_path / "checkpoints" / "step-00000005" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["meter"]
    save_state(state, path)
    train(IterableSource(raw(20)), shape("topk"), chosen, folder=tmp_path)
    assert [line["step"] for line in logged_lines(tmp_path)] == [10, 20]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path)
    lines.log({"step": 1, "fvu": float("inf"), "loss": float("nan"), "l0": 3.0})
    lines.close()
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse) == {"step": 1, "fvu": None, "loss": None, "l0": 3.0}
    write_bytes(tmp_path / "metrics.jsonl", b'{"step": 1, "fvu": Infinity}\n')
    JsonLines(tmp_path, resume_step=1).close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == {"step": 1, "fvu": None}


def test_the_loss_falls_with_fvu_though_features_die() -> None:
    """What revives dead features is told apart: with it, the objective rises from one line to a later one."""
    lines: list[dict[str, float]] = []
    train(
        IterableSource(raw(20)), shape("topk"), settings(120, log_every=20, dead_after_tokens=10 * BATCH),
        progress=lambda done, of, metrics: lines.append({k: float(v) for k, v in metrics.items()}),
    )  # fmt: skip
    assert any(line.get("aux", 0) > 0 for line in lines)
    for line in lines:
        assert line["loss"] == pytest.approx(line["mse"], rel=1e-5)
        assert line["objective"] == pytest.approx(line["mse"] + line.get("aux", 0), rel=1e-5)
