"""The type of the encoder's product: chosen by the processor, and kept by a training that is resumed elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae.dictionary.saved import weights_sha256
from sae.kernels import products
from sae.training import IterableSource, train
from sae.training.checkpoint import STATE_FILE, list_checkpoints
from tests.support.states import save_state
from tests.training.test_loop import BATCH, SHAPE, planted, settings

STEPS = 50


def processor(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    """Train as on a processor that has bfloat16 instructions, or has not."""
    monkeypatch.setattr(products, "cpu_has_bfloat16", lambda: bfloat16)


def trained(steps: int = STEPS, folder: Path | None = None, **changes: object) -> str:
    """The hash of the weights."""
    chosen = settings(steps, **{"warmup_fraction": 0, "decay_fraction": 0, "lr": 1e-3, **changes})
    return weights_sha256(train(IterableSource(planted(20)), SHAPE, chosen, folder=folder))


def test_bfloat16_is_the_default_on_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, by_default = trained(encoder_dtype="float32"), trained()
    processor(monkeypatch, bfloat16=True)
    rounded = trained(encoder_dtype="bfloat16")
    assert by_default == exact != rounded
    assert trained() == rounded


@pytest.mark.parametrize("begun", [False, True], ids=["begun in float32", "begun in bfloat16"])
def test_a_resumed_training_keeps_the_type_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: bool
) -> None:
    processor(monkeypatch, bfloat16=begun)
    whole = trained()
    trained(STEPS, tmp_path)
    for later in list_checkpoints(tmp_path / "checkpoints")[1:]:
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    processor(monkeypatch, bfloat16=not begun)
    assert trained(STEPS, tmp_path) == whole
    assert trained() != whole


def test_a_checkpoint_from_before_the_type_was_recorded_continues_in_float32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = trained()
    trained(STEPS // 2, tmp_path, tokens=STEPS // 2 * BATCH)
    file = list_checkpoints(tmp_path / "checkpoints")[-1] / STATE_FILE
    state: dict[str, Any] = torch.load(file, weights_only=True)
    assert state.pop("encoder_dtype") == "float32"
    state["identity"]["tokens"] = STEPS * BATCH
    save_state(state, file)
    processor(monkeypatch, bfloat16=True)
    assert trained(STEPS, tmp_path) == whole
