"""What training logs: every term of the loss with its weight, as means over the steps between two lines."""

from __future__ import annotations

import pytest
import torch

from sae.architectures import ARCHITECTURES
from sae.training import IterableSource, train
from sae.training.meter import Meter
from sae.training.objectives import Losses
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
        assert line["loss"] == pytest.approx(error + weight * penalty + revived, rel=1e-5), line["step"]
    last = lines[-1]
    assert ("sparsity_weight" in last) == (architecture in ("relu", "gated", "jumprelu"))
    assert ("threshold" in last) == (architecture in ("batch_topk", "matryoshka"))
    if architecture == "jumprelu":
        assert last["sparsity_weight"] == D_IN, "the default weight of (L0 / k − 1)²"
    assert last["gradient_norm"] > 0
    assert any("revival" in line for line in lines) == (architecture in ("relu", "gated"))
    assert any("aux" in line for line in lines) == (architecture != "relu")


def test_logged_numbers_are_means_of_the_steps_between() -> None:
    """Also what is changed in place, as the threshold is."""

    def logged(log_every: int) -> list[float]:
        found: list[float] = []
        train(
            IterableSource(raw(20)), shape("batch_topk"), settings(8, log_every=log_every),
            progress=lambda done, of, metrics: found.append(float(metrics["threshold"])),
        )  # fmt: skip
        return found

    single = logged(1)
    assert logged(2) == pytest.approx([(a + b) / 2 for a, b in zip(single[::2], single[1::2], strict=True)], rel=1e-5)


def test_a_term_that_some_steps_lack_is_nothing_in_them() -> None:
    """So that what is logged of terms of constant weight adds up over any interval."""
    meter, one = Meter(BATCH), torch.ones(())
    nothing = torch.zeros(D_SAE)
    meter.add(Losses(2 * one, {"mse": 2 * one}, nothing, one), one)
    meter.add(Losses(5 * one, {"mse": 2 * one, "aux": 3 * one}, nothing, one), one)
    found = meter.read()
    assert (found["loss"], found["mse"], found["aux"]) == (3.5, 2.0, 1.5)
