"""Settings that only some architectures read: they do what they are for, and are refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sae
from sae.architectures import ARCHITECTURES, TopK
from sae.dictionary.saved import weights_sha256
from sae.errors import ConfigError, FormatError
from sae.runs.run import Run
from sae.training import IterableSource, train
from sae.training.checkpoint import STATE_FILE, list_checkpoints
from sae.training.traits import READERS, unread
from tests.conftest import TinyConfig
from tests.support.quick import quick_for
from tests.support.states import save_state
from tests.training.test_control import raw, shape
from tests.training.test_loop import BATCH, planted, settings


@pytest.mark.slow
def test_jumprelu_takes_the_weight_and_the_bandwidth_that_are_set() -> None:
    def made(steps: int = 400, **changes: float) -> sae.Dictionary:
        return train(IterableSource(planted(50)), shape("jumprelu"), settings(steps, **{"lr": 3e-3, **changes}))

    def l0(dictionary: sae.Dictionary) -> float:
        return float((dictionary.encode(torch.cat(planted(50))) > 0).sum(1).float().mean())

    heavy = made(l0_coefficient=0.5)
    assert l0(heavy) < 0.7 * l0(made(l0_coefficient=0.02))
    begun, narrow = made(1, lr=1e-12).get_parameter("threshold"), made(l0_coefficient=0.5, bandwidth=1e-9)
    torch.testing.assert_close(narrow.get_parameter("threshold"), begun)  # nothing is ever within so small a window
    assert (heavy.get_parameter("threshold") - begun).abs().max() > 0.1 * begun.max()


READ_BY_SOME = {
    "train.l1_coefficient": 5.0, "train.l0_coefficient": 5.0, "train.bandwidth": 0.3,
    "train.sparsity_warmup_fraction": 0.9, "train.k_aux": 1, "train.encoder_dtype": "bfloat16",
    "dictionary.prefixes": (0.25, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("architecture", quick_for(["gated", "matryoshka"], ARCHITECTURES))
def test_settings_are_read_by_those_that_they_are_said_to_be_for(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.kernels.products.cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr("sae.training.check.check_read", lambda *_: None)

    def made(key: str = "", value: object = None) -> tuple[str, bool]:
        section, _, name = key.partition(".")
        changed = {name: value} if key else {}
        products = {} if name == "encoder_dtype" else {"encoder_dtype": "float32"}  # which all architectures take
        of = shape(architecture, **(changed if section == "dictionary" else {}))
        chosen = settings(60, dead_after_tokens=BATCH, **products, **(changed if section == "train" else {}))
        return weights_sha256(train(IterableSource(raw(20)), of, chosen)), bool(unread(of, chosen))

    assert READ_BY_SOME.keys() == READERS.keys()
    plain, _ = made()
    for key, value in READ_BY_SOME.items():
        changed, refused = made(key, value)
        assert (changed != plain) == (architecture in READERS[key]), key
        assert refused == (architecture not in READERS[key]), key


def test_a_setting_that_was_never_read_holds_up_no_resumption(tmp_path: Path) -> None:
    """Before such settings were refused, checkpoints were made with them."""
    train(IterableSource(planted(30)), shape(), settings(25), folder=tmp_path)
    state = list_checkpoints(tmp_path / "checkpoints")[-1] / STATE_FILE
    held = torch.load(state, weights_only=True)
    held["identity"]["l1_coefficient"] = 3.0  # as it was noted then
    held["identity"]["tokens"] = 50 * BATCH
    save_state(held, state)
    seen: list[int] = []
    train(
        IterableSource(planted(30)), shape(), settings(50), folder=tmp_path, progress=lambda done, *_: seen.append(done)
    )
    assert seen[0] == 30 * BATCH


def test_a_resumed_training_keeps_the_defaults_that_it_was_begun_with(tmp_path: Path) -> None:
    """Whatever they have become since: learning rate, age at which features are dead, warmup of the penalty."""
    train(IterableSource(planted(30)), shape("gated"), settings(25), folder=tmp_path)
    state = list_checkpoints(tmp_path / "checkpoints")[-1] / STATE_FILE
    held = torch.load(state, weights_only=True)
    held["identity"]["tokens"], held["firing"]["dead_after"] = 50 * BATCH, 777
    held["rate"], held["sparsity_warmup"] = 0.00123, 1.0
    save_state(held, state)
    lines: dict[int, dict[str, float]] = {}
    made = train(
        IterableSource(planted(30)), shape("gated"), settings(50), folder=tmp_path,
        progress=lambda done, of, metrics: lines.update({done // BATCH: metrics}),
    )  # fmt: skip
    assert made.metadata["trained"]["dead_after_tokens"] == 777
    assert lines[30]["lr"] == pytest.approx(0.00123)
    state = torch.load(list_checkpoints(tmp_path / "checkpoints")[-1] / STATE_FILE, weights_only=True)
    assert (state["rate"], state["sparsity_warmup"]) == (0.00123, 1.0)


def test_what_cannot_be_trained_is_refused_before_anything_is_made(tiny_config: TinyConfig, tmp_path: Path) -> None:
    TopK(8, 64, k=4).save(tmp_path)
    for changes, message in (
        ({"train__l0_coefficient": 0.5}, r"train.l0_coefficient=0.5 has no effect on topk, only on jumprelu: take it"),
        ({"train__bandwidth": 0.5, "dictionary__architecture": "relu"}, "train.bandwidth=0.5 has no effect on relu"),
        ({"dictionary__prefixes": [0.5, 1.0]}, "dictionary.prefixes=.* has no effect on topk, only on matryoshka"),
        ({"train__k_aux": 5, "dictionary__architecture": "relu"}, "train.k_aux=5 has no effect on relu"),
        (
            {"train__encoder_dtype": "bfloat16", "dictionary__architecture": "gated"},
            "train.encoder_dtype='bfloat16' has no effect on gated, only on topk, batch_topk, matryoshka",
        ),
        ({"train__freeze": ["W_gate"]}, "train.freeze: topk trains no 'W_gate'; it trains "),
        ({"train__start_from": "nowhere"}, "train.start_from: dictionary 'nowhere': no config.json there"),
        (
            {"train__start_from": str(tmp_path), "dictionary__d_sae": 32},
            "has d_sae=64 and d_in=8, the new one d_sae=32",
        ),
    ):
        config = tiny_config(**changes)
        with pytest.raises((ConfigError, FormatError), match=message):
            sae.run(config)
        assert not config.folder.exists()
    with pytest.raises(ConfigError, match="train them with 'sae sweep'"):
        sae.run(tiny_config(train__l0_coefficient=0.5, sweep={"dictionary": {"k": [2, 4]}}))
    sae.harvest(tiny_config())
    with pytest.raises(ConfigError, match="has no effect on topk"):
        Run(tiny_config(train__l0_coefficient=0.5)).train()
    with pytest.raises(ConfigError, match=r"train\.l1_coefficient=3\.0 has no effect on topk"):
        train(IterableSource(planted(1)), shape(), settings(1, l1_coefficient=3.0), folder=tiny_config().folder / "new")
    assert not (tiny_config().folder / "new").exists()
