"""What a researcher decides beyond the defaults: where weights begin, which stay, what is saved on the way."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae
from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig
from sae.dictionary.saved import weights_sha256
from sae.errors import ConfigError, FormatError, TrainingError
from sae.files.writing import write_json
from sae.numerics.seeding import torch_generator
from sae.runs.run import Run
from sae.training import IterableSource, TrainingInterrupted, train
from sae.training.initialise import geometric_median
from sae.training.threshold import rows_for_threshold
from tests.conftest import TinyConfig
from tests.support.quick import quick_for
from tests.training.test_loop import BATCH, D_IN, D_SAE, K, fvu, planted, read_by, settings

MATRICES = ("W_enc", "W_dec")
NOT_BY_GRADIENT = {("batch_topk", "threshold"), ("matryoshka", "threshold")}


SNAPSHOTS = {"snapshots": (10 * BATCH, 20 * BATCH), "checkpoint_every": 10}


def shape(architecture: str = "topk", **changes: object) -> DictionaryConfig:
    return DictionaryConfig(**{"architecture": architecture, "d_sae": D_SAE, "k": K, **changes})  # type: ignore[arg-type]


def raw(count: int = 100) -> list[torch.Tensor]:
    """Activations that are neither centred nor of norm √d_in."""
    return [7.0 * x + 3.0 for x in planted(count)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [*MATRICES, "b_dec"])
def test_what_is_frozen_stays_and_the_rest_learns(architecture: str, name: str) -> None:
    chosen = read_by(architecture, freeze=(name,), l1_coefficient=0.1)
    short, long = (
        train(IterableSource(planted(100)), shape(architecture), settings(steps, **chosen)) for steps in (1, 60)
    )
    for label in (*MATRICES, "b_dec"):
        before, after = short.get_parameter(label), long.get_parameter(label)
        if label == "W_enc":  # ReLU's takes the norms of the decoder's rows over at the end
            before, after = (torch.nn.functional.normalize(w, dim=0) for w in (before, after))
        assert torch.allclose(before, after, rtol=0, atol=1e-6) == (label == name), label
    x = torch.cat(planted(100))
    assert fvu(long, x) < fvu(short, x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_parameter_can_be_the_only_one_that_learns(architecture: str) -> None:
    whole = train(IterableSource(planted(10)), shape(architecture), settings(1))
    names = [name for name, _ in whole.named_parameters() if (architecture, name) not in NOT_BY_GRADIENT]
    for name in names:
        others = tuple(other for other in names if other != name)
        penalty = read_by(architecture, l1_coefficient=0.1)
        chosen = settings(20, freeze=others, max_gradient_norm=1.0, lr=3e-2, decay_fraction=0, **penalty)
        made = train(IterableSource(planted(10)), shape(architecture), chosen)
        still = train(IterableSource(planted(10)), shape(architecture), chosen.model_copy(update={"lr": 1e-12}))
        assert not torch.allclose(made.get_parameter(name), still.get_parameter(name), atol=1e-4), name


def test_frozen_weights_begin_as_they_would_have() -> None:
    frozen = train(IterableSource(planted(100)), shape(), settings(1, freeze=("W_dec", "b_dec"), lr=0.1))
    free = train(IterableSource(planted(100)), shape(), settings(1, lr=1e-12))
    directions = torch.randn(D_SAE, D_IN, generator=torch_generator("initial weights: training", 0))
    torch.testing.assert_close(frozen.W_dec, torch.nn.functional.normalize(directions, dim=1))
    torch.testing.assert_close(frozen.W_dec, free.W_dec)
    torch.testing.assert_close(frozen.b_dec, free.b_dec)


def test_what_cannot_be_frozen_is_refused() -> None:
    def frozen(*names: str, architecture: str = "topk") -> None:
        train(IterableSource(planted(10)), shape(architecture), settings(5, freeze=names))

    with pytest.raises(ConfigError, match=r"topk trains no 'W_dek'; it trains W_enc, b_enc, W_dec, b_dec"):
        frozen("W_dek")
    with pytest.raises(ConfigError, match=r"batch_topk trains no 'threshold'"):
        frozen("threshold", architecture="batch_topk")
    with pytest.raises(ConfigError, match="leave at least one"):
        frozen("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("how", ["autoencoder", "centred", "transcoder"])
def test_training_begins_with_another_s_weights(architecture: str, how: str) -> None:
    """A step that moves next to nothing leaves what there was, in raw units, whatever the normalisations."""
    changes = {"center": how == "centred", "lr": 3e-3}
    targets = {"target": IterableSource([5.0 * x.flip(1) - 1.0 for x in planted(100)])} if how == "transcoder" else {}
    first = train(IterableSource(raw()), shape(architecture), settings(100, **changes), **targets)
    before = weights_sha256(first)
    other = {**changes, "center": how != "centred", "lr": 1e-12}
    again = train(
        IterableSource([2.0 * x for x in raw()]), shape(architecture), settings(1, **other), start=first, seed=9,
        **targets,
    )  # fmt: skip
    assert weights_sha256(first) == before
    if architecture in ("batch_topk", "matryoshka"):  # the threshold is of the newest batches
        again.get_parameter("threshold").copy_(first.get_parameter("threshold"))
    x = torch.cat(raw())
    as_before = torch.isclose(again(x), first(x), rtol=1e-3, atol=1e-2).all(dim=1)
    if hasattr(first, "threshold"):  # rounding decides on which side of it a few activations fall
        assert as_before.float().mean() >= 0.999
    else:
        assert as_before.all()


@pytest.mark.parametrize("architecture", quick_for(["gated"], ["relu", "gated", "jumprelu", "batch_topk"]))
def test_one_of_another_architecture_is_a_start_too(architecture: str) -> None:
    x = torch.cat(planted(100))
    as_gao = {"aux_coefficient": 1 / 32, "k_aux": D_IN // 2}
    first = train(IterableSource(planted(100)), shape(), settings(400, lr=3e-3, **as_gao))
    chosen = settings(20, **read_by(architecture, l1_coefficient=0.1))
    warm, cold = (
        train(IterableSource(planted(100)), shape(architecture), chosen, start=start) for start in (first, None)
    )
    assert fvu(warm, x) < 0.7 * fvu(cold, x)
    untouched = train(IterableSource(planted(100)), shape(architecture), settings(1, lr=1e-12), start=first)
    # The first batch sets where they begin; the threshold of BatchTopK is that of the rows after it.
    rows = x[BATCH : BATCH + rows_for_threshold(K)] if architecture == "batch_topk" else x[:BATCH]
    tolerance = 1e-3 if architecture == "batch_topk" else 0.1
    assert float((untouched.encode(rows) > 0).float().sum(1).mean()) == pytest.approx(K, rel=tolerance)


@pytest.mark.parametrize("architecture", quick_for(["batch_topk"], ["topk", "batch_topk", "jumprelu"]))
def test_a_gated_start_brings_its_gain(architecture: str) -> None:
    x = torch.cat(planted(100))
    first = train(IterableSource(planted(100)), shape("gated"), settings(400, lr=3e-3))
    assert isinstance(first, sae.architectures.Gated)
    with torch.no_grad():  # the same function, with most of the gain in the encoder's scale
        first.W_enc.mul_(3.0)
        first.b_gate.mul_(3.0)
        first.r_mag.sub_(math.log(3.0))
    begun = train(IterableSource(planted(100)), shape(architecture), settings(1, lr=1e-12), start=first)
    assert fvu(begun, x) < fvu(first, x) + 0.05


def test_decoder_rows_of_a_start_get_norm_1() -> None:
    x = torch.cat(planted(100))
    first = train(IterableSource(planted(100)), shape(), settings(200, lr=3e-3))
    scaled = copy.deepcopy(first)
    with torch.no_grad():
        scaled.W_dec.mul_(3.0)
        scaled.W_enc.div_(3.0)
        scaled.b_enc.div_(3.0)
    torch.testing.assert_close(scaled(x), first(x), rtol=1e-4, atol=1e-4)
    begun = train(IterableSource(planted(100)), shape(), settings(1, lr=1e-12), start=scaled)
    torch.testing.assert_close(begun(x), first(x), rtol=1e-3, atol=1e-3)


def test_a_start_of_another_shape_is_refused() -> None:
    first = train(IterableSource(planted(10)), shape(), settings(1))
    with pytest.raises(ConfigError, match=rf"has d_sae={D_SAE} and d_in={D_IN}, the new one d_sae={2 * D_SAE}"):
        train(IterableSource(planted(10)), shape(d_sae=2 * D_SAE), settings(1), start=first)


def test_a_run_starts_from_another_and_resumes_with_no_other(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(data__tokens=2000)
    run = Run(config)
    run.harvest()
    first = run.train()

    def begun(start: str, **interrupted: bool) -> Run:
        made = tiny_config(
            out=str(tmp_path / "second"), harvest__cache=str(config.cache_folder), data__tokens=2000,
            train__start_from=str(tmp_path / start), train__lr=1e-12, train__checkpoint_every=10,
        )  # fmt: skip
        # Before the first step nothing can be saved, and Ctrl-C is what it is everywhere.
        return Run(made, lambda stage, done, of: signal.raise_signal(signal.SIGINT) if interrupted and done else None)

    with pytest.raises(FormatError, match=r"train\.start_from: .* no config\.json there; give a dictionary folder"):
        begun("nowhere").train()
    first.save(tmp_path / "start")
    with pytest.raises(TrainingInterrupted):
        begun("start", interrupted=True).train()
    other = train(IterableSource([torch.randn(BATCH, first.d_in)]), shape(d_sae=first.d_sae), settings(1))
    other.save(tmp_path / "other")
    with pytest.raises(TrainingError, match="made with start"):
        begun("other").train()
    (tmp_path / "start").rename(tmp_path / "moved")
    made = begun("moved").train()
    torch.testing.assert_close(made.W_dec, first.W_dec, rtol=1e-3, atol=1e-3)
    assert made.metadata["trained"]["settings"]["start"] == weights_sha256(first)
    with pytest.raises(FormatError, match="made with start"):
        begun("other").train()
    shutil.rmtree(tmp_path / "moved")
    assert weights_sha256(begun("moved").train()) == weights_sha256(made), "what is done needs no start"


def test_snapshots_are_the_dictionary_after_so_many_tokens_and_stay(tmp_path: Path) -> None:
    chosen = settings(
        40, snapshots=(1, 10 * BATCH, 10 * BATCH + 1), checkpoint_every=10, keep_checkpoints=4, log_every=10
    )
    made = train(IterableSource(planted(100)), shape(), chosen, folder=tmp_path)
    saved = sorted(path.name for path in (tmp_path / "snapshots").iterdir())
    assert saved == [f"tokens-{step * BATCH:012d}" for step in (1, 10, 11)]
    tenth, checkpoint = (
        sae.load(tmp_path / "snapshots" / saved[1]), sae.load(tmp_path / "checkpoints" / "step-00000010")
    )  # fmt: skip
    assert weights_sha256(tenth) == weights_sha256(checkpoint) != weights_sha256(made)
    assert tenth.metadata["trained"]["tokens"] == 10 * BATCH


@pytest.mark.slow
def test_a_kill_at_a_snapshot_loses_none(tmp_path: Path) -> None:
    """Snapshot and checkpoint are due at the same step, and the process dies as soon as one of them is there."""
    code = f"""
import os, signal
from pathlib import Path
from sae.training import loop
from tests.training.test_control import *
def dying(folder, step, *rest, kept=loop.save_checkpoint):
    kept(folder, step, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
loop.save_checkpoint = dying
train(IterableSource(planted(100)), shape(), settings(40, **SNAPSHOTS), folder=Path({str(tmp_path)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    train(IterableSource(planted(100)), shape(), settings(40, **SNAPSHOTS), folder=tmp_path)
    assert len(list((tmp_path / "snapshots").iterdir())) == 2


def test_snapshots_that_are_asked_for_too_late_are_named(tmp_path: Path) -> None:
    train(IterableSource(planted(100)), shape(), settings(40, snapshots=(BATCH,)), folder=tmp_path)
    with pytest.warns(UserWarning, match=rf"has passed {2 * BATCH - 1:,} tokens.*there will be none"):
        train(IterableSource(planted(100)), shape(), settings(40, snapshots=(BATCH, 2 * BATCH - 1)), folder=tmp_path)


def test_snapshots_that_cannot_be_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.snapshots needs a folder"):
        train(IterableSource(planted(10)), shape(), settings(5, snapshots=(BATCH,)))
    with pytest.raises(ConfigError, match=rf"has {5 * BATCH + 1:,}, and training ends after {5 * BATCH:,} tokens"):
        train(IterableSource(planted(10)), shape(), settings(5, snapshots=(5 * BATCH + 1,)), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_that_diverged_leaves_no_snapshot(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="training diverged"):
        train(IterableSource(planted(10)), shape(), settings(5, lr=1e30, snapshots=(3 * BATCH,)), folder=tmp_path)
    assert not (tmp_path / "snapshots").exists()


@pytest.mark.parametrize("centre", ["geometric_median", "mean", "zeros"])
def test_where_b_dec_begins(centre: str) -> None:
    data = [x.square() for x in raw(1)]  # of which mean and median differ
    expected = {
        "geometric_median": geometric_median(data[0]), "mean": data[0].mean(0), "zeros": torch.zeros(D_IN),
    }  # fmt: skip
    made = train(IterableSource(data), shape(), settings(1, lr=1e-12, initial_b_dec=centre))
    torch.testing.assert_close(made.b_dec, expected[centre], rtol=1e-3, atol=1e-2)
    if centre != "geometric_median":
        with pytest.raises(ConfigError, match=rf"initial_b_dec='{centre}' has no effect if training starts"):
            train(IterableSource(data), shape(), settings(1, initial_b_dec=centre), start=made)


def test_a_large_gradient_is_scaled_down(tmp_path: Path) -> None:
    """Adam forgets the scale of a constant gradient, so one batch that is far out tells whether it was cut."""
    data = planted(30)
    data[20] = 1000 * data[20]

    def trained(**changes: object) -> tuple[sae.Dictionary, list[dict[str, float | int]]]:
        lines: list[dict[str, float | int]] = []
        made = train(
            IterableSource(data), shape(), settings(30, log_every=1, **changes),
            progress=lambda done, of, metrics: lines.append(metrics),
        )  # fmt: skip
        return made, lines

    plain, _ = trained()
    loose, lines = trained(max_gradient_norm=1e9)
    cut, _ = trained(max_gradient_norm=float(sorted(line["gradient_norm"] for line in lines)[15]))
    assert torch.equal(plain.W_dec, loose.W_dec)
    x = torch.cat([*data[:20], *data[21:]])
    assert fvu(cut, x) < 0.9 * fvu(plain, x)


def test_how_lists_may_be_written() -> None:
    chosen = settings(1, freeze="W_dec", snapshots=["1e3", 128, 128])
    assert chosen.freeze == ("W_dec",)
    assert chosen.snapshots == (128, 1000)
    assert settings(1, freeze=["b_dec", "W_dec"]) == settings(1, freeze=["W_dec", "b_dec"])
    assert settings(1, snapshots="1e6").snapshots == (1_000_000,)


def test_a_start_that_nobody_loaded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"give start=sae\.load\(folder\)"):
        train(IterableSource(planted(10)), shape(), settings(1, start_from="somewhere"))


def test_k_above_d_sae_is_refused_for_all() -> None:
    for architecture in ARCHITECTURES:
        with pytest.raises(ConfigError, match=r"k=49 exceeds dictionary\.d_sae=48"):
            train(IterableSource(planted(10)), shape(architecture, k=49), settings(1))


def test_what_was_made_before_a_setting_existed_is_still_what_was_asked_for(tiny_config: TinyConfig) -> None:
    run = Run(tiny_config(data__tokens=2000))
    run.harvest()
    run.train()
    path = run.folder / "dictionary" / "config.json"
    config = json.loads(path.read_text())
    for key in ("initial_b_dec", "freeze", "max_gradient_norm"):
        del config["metadata"]["trained"]["settings"][key]
    write_json(path, config)
    run.train()
    with pytest.raises(FormatError, match=r"made with freeze=\[\], now \['W_dec'\] is asked for"):
        Run(tiny_config(data__tokens=2000, train__freeze=["W_dec"])).train()
