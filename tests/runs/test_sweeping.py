"""Sweeps: every combination in one pass, a folder each; killed and resumed with the same weights; compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import sae
from sae.activations.loader import ActivationLoader
from sae.architectures import ARCHITECTURES, load
from sae.errors import ConfigError, FormatError, SaeError
from sae.runs.run import Run
from sae.runs.sweeping import sweep
from sae.runs.variants import variants
from sae.training import TrainingInterrupted
from sae.training.checkpoint import list_checkpoints
from tests.conftest import TinyConfig

ALL = list(ARCHITECTURES)


def swept(
    tiny_config: TinyConfig, *, tokens: int = 4000, frozen_decoder_tokens: int = 0, **axes: object
) -> sae.RunConfig:
    return tiny_config(
        data__tokens=2000, train__tokens=tokens, train__log_every=10, evaluation__tokens=100,
        evaluation__downstream_tokens=64, evaluation__frozen_decoder_tokens=frozen_decoder_tokens, sweep=axes,
    )  # fmt: skip


def test_variants_are_all_combinations_by_names_of_what_differs(tiny_config: TinyConfig) -> None:
    config = swept(tiny_config, dictionary={"architecture": ["topk", "relu"], "k": [2, 4]}, seed=[0, 1])
    made = variants(config)
    assert list(made) == [
        f"{architecture}-k{k}-seed{seed}" for architecture in ("topk", "relu") for k in (2, 4) for seed in (0, 1)
    ]
    one = made["relu-k4-seed1"]
    assert (one.dictionary.architecture, one.dictionary.k, one.seed, one.sweep) == ("relu", 4, 1, {})
    assert Path(one.out) == Path(config.out) / "relu-k4-seed1"
    assert one.cache_folder == config.cache_folder
    assert one.train.shuffle_seed == config.seed


def test_names_are_apart_from_words_and_folders_of_the_former_names_are_used(tiny_config: TinyConfig) -> None:
    config = swept(tiny_config, train={"encoder_dtype": ["float32", "bfloat16"], "lr": [0.001, None]}, seed=[0])
    names = [
        f"encoder_dtype-{dtype}-{lr}-seed0" for dtype in ("float32", "bfloat16") for lr in ("lr0.001", "lr-None")
    ]  # fmt: skip
    assert list(variants(config)) == names
    older = config.folder / "encoder_dtypefloat32-lrNone-seed0"
    older.mkdir(parents=True)
    made = variants(config)
    assert list(made) == [names[0], older.name, *names[2:]]
    assert (made[older.name].folder, made[older.name].train.lr) == (older, None)
    (config.folder / names[1]).mkdir()
    assert list(variants(config)) == names


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({}, "sweep is empty: give lists of values"),
        ({"dictionary": {"k": 4}}, r"sweep.dictionary.k=4: expected a list of values"),
        ({"dictionary": {"k": []}}, r"sweep.dictionary.k=\[\]: expected a list of values"),
        ({"harvest": {"dtype": ["int8"]}}, "sweep.harvest.dtype: only keys of dictionary and train, and seed"),
        ({"train": {"batch_size": [32, 64]}}, "sweep.train.batch_size: all dictionaries of a sweep share one pass"),
        ({"train": {"shuffle_seed": [1, 2]}}, "sweep.train.shuffle_seed: all dictionaries of a sweep share one pass"),
        (
            {"dictionary": {"architecture": ["matryoshka"], "prefixes": [[0.5]]}},
            "expected ascending shares of d_sae=64",
        ),
        ({"dictionary": {"k": [4, 4]}}, "sweep has 'k4' twice"),
        ({"dictionary": {"kk": [4]}}, "unknown setting 'dictionary.kk': did you mean dictionary.k"),
        ({"dictionary": {"k": [4, 100]}}, "dictionary.k=100 exceeds dictionary.d_sae=64"),
        (
            {"dictionary": {"architecture": ["relu", "topk"]}, "train": {"l1_coefficient": [1.0, 2.0]}},
            "sweep.train.l1_coefficient=1.0 has no effect on topk, only on relu, gated: take it out",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused(tiny_config: TinyConfig, axes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        variants(swept(tiny_config, **axes))


def test_a_setting_for_all_is_left_out_where_it_has_no_effect(tiny_config: TinyConfig) -> None:
    config = swept(tiny_config, dictionary={"architecture": ["topk", "relu", "jumprelu"]})
    config = config.model_copy(update={"train": config.train.model_copy(update={"l1_coefficient": 3.0})})
    made = variants(config)
    assert {name: variant.train.l1_coefficient for name, variant in made.items()} == {
        "topk": None, "relu": 3.0, "jumprelu": None,
    }  # fmt: skip
    for_nobody = config.model_copy(update={"sweep": {"dictionary": {"architecture": ["topk", "jumprelu"]}}})
    with pytest.raises(ConfigError, match=r"train.l1_coefficient=3.0 has no effect on topk, jumprelu, only on relu, g"):
        variants(for_nobody)


def test_a_single_run_does_not_take_a_sweep(tiny_config: TinyConfig) -> None:
    config = swept(tiny_config, dictionary={"k": [2, 4]})
    Run(config).harvest()
    with pytest.raises(ConfigError, match="train them with 'sae sweep', or remove sweep"):
        Run(config).train()


@pytest.mark.slow
def test_one_pass_trains_evaluates_and_compares_all(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = ActivationLoader.__iter__

    def counting(self: ActivationLoader) -> Iterator[torch.Tensor]:
        read.append(self.hook)
        return original(self)

    monkeypatch.setattr(ActivationLoader, "__iter__", counting)
    config = swept(tiny_config, tokens=2000, frozen_decoder_tokens=1000, dictionary={"architecture": ALL, "k": [2, 4]})
    done = sweep(config)
    assert read == ["blocks.1.hook_resid_pre"] * 2, "one reading for all dictionaries, one for their frozen decoders"
    assert set(done.points) == {f"{name}-k{k}" for name in ALL for k in (2, 4)}
    for name, point in done.points.items():
        folder = Path(config.out) / name
        report = json.loads((folder / "eval.json").read_text())
        assert point.fvu.value == report["fvu"]["value"]
        assert point.l0.value == report["l0"]["value"]
        assert point.tokens == 1984  # 31 steps of 64
        assert point.seconds is not None
        assert point.seconds > 0
        assert done.dictionary(name).architecture == point.architecture
    written = json.loads((Path(config.out) / "sweep.json").read_text())
    assert written["points"]["topk-k2"]["l0"]["value"] == 2.0
    text = (Path(config.out) / "sweep.md").read_text()
    assert all(f"| {name} |" in text for name in done.points)
    values = {name: point.fvu.value for name, point in done.points.items() if point.k == 4}
    best = min(values, key=lambda name: values[name])
    behind = {name: found["fvu"] for name, found in written["behind"].items() if name in values and "fvu" in found}
    assert set(behind) == values.keys() - {best}
    for name, step in behind.items():
        assert step["best"] == best
        assert step["value"] == pytest.approx(values[name] - values[best], abs=1e-12)
    assert "| FVU | dictionary | PCA | random | frozen decoder |" in text
    of = "`blocks.1.hook_resid_pre`, 32 → 64; 2,000 tokens in batches of 64, of a cache of 2,000; evaluated"
    assert of in text and of in written["of"]
    assert (Path(config.out) / "pareto.png").read_bytes().startswith(b"\x89PNG")
    # A variant's folder is a run of its own, which knows that it is done.
    alone = Run.open(Path(config.out) / "topk-k4")
    alone.train()
    assert alone.is_evaluated()
    read.clear()
    again = sweep(config)
    assert read == [], "what is done is not done again"
    assert again.points == done.points


@pytest.mark.slow
def test_a_variant_trained_alone_is_the_sweep_s(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = swept(tiny_config, dictionary={"architecture": ["batch_topk", "gated"]}, seed=[3])
    done = sweep(config)
    for name in done.points:
        alone = variants(config)[name].model_copy(update={"out": str(tmp_path / "alone" / name)})
        ours, theirs = Run(alone).train(), done.dictionary(name)
        for label, parameter in ours.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(label)), (name, label)


@pytest.mark.slow
def test_a_value_that_is_added_later_is_trained_alone(tiny_config: TinyConfig) -> None:
    sweep(swept(tiny_config, dictionary={"k": [2]}))
    before = Run.open(tiny_config().folder / "k2").dictionary().W_dec
    done = sweep(swept(tiny_config, dictionary={"k": [2, 4]}))
    assert set(done.points) == {"k2", "k4"}
    assert torch.equal(done.dictionary("k2").W_dec, before)
    with pytest.raises(FormatError, match="made with k=2, now 3"):
        renamed = tiny_config().folder / "k3"
        (tiny_config().folder / "k2").rename(renamed)
        sweep(swept(tiny_config, dictionary={"k": [3]}))


@pytest.mark.slow
def test_some_at_a_time_are_the_same_dictionaries(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = swept(tiny_config, dictionary={"k": [2, 3, 4]}).model_copy(update={"sweep_at_once": 2})
    stages: list[str] = []
    done = sweep(config, lambda stage, done, of: stages.append(stage))
    assert [stage for stage in dict.fromkeys(stages) if stage.startswith("train")] == ["train 2", "train 1"]
    whole = sweep(config.model_copy(update={"sweep_at_once": None, "out": str(tmp_path / "whole")}))
    for name in whole.points:
        assert torch.equal(done.dictionary(name).W_dec, whole.dictionary(name).W_dec), name


@pytest.mark.slow
def test_a_sweep_cut_short_in_its_evaluation_goes_on_after_what_was_written(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = swept(tiny_config, dictionary={"d_sae": [48, 64], "k": [2, 4]}).model_copy(update={"sweep_at_once": 2})
    evaluated: list[int] = []
    original = sae.runs.run.evaluate_all

    def cut_short(dictionaries: dict[str, object], *arguments: object, **others: object) -> object:
        evaluated.append(len(dictionaries))
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return original(dictionaries, *arguments, **others)  # type: ignore[arg-type]

    monkeypatch.setattr("sae.runs.run.evaluate_all", cut_short)
    with pytest.raises(KeyboardInterrupt):
        sweep(config)
    done = sweep(config)
    assert evaluated == [2, 2, 2], "two, two that were cut short, and these again"
    assert {(point.d_sae, point.k) for point in done.points.values()} == {(48, 2), (48, 4), (64, 2), (64, 4)}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"train": {"freeze": [["W_dec"], ["threshold"]]}}, r"^freeze-threshold: train\.freeze: topk trains no"),
        ({"train": {"start_from": [None, "nowhere"]}}, r"^start_from-nowhere: train\.start_from: dictionary 'nowhere'"),
    ],
)
def test_what_one_cannot_do_is_said_before_activations_are_harvested(
    tiny_config: TinyConfig, axes: dict[str, object], message: str
) -> None:
    config = swept(tiny_config, **axes)
    with pytest.raises(SaeError, match=message):
        sweep(config)
    assert not config.folder.exists()


def test_what_the_cache_is_too_small_for_is_said_before_any_is_trained(tiny_config: TinyConfig) -> None:
    config = swept(tiny_config, train={"snapshots": [[640], [999_999]]}).model_copy(update={"sweep_at_once": 1})
    with pytest.raises(SaeError, match=r"snapshots999999: train\.snapshots has 999,999"):
        sweep(config)
    assert not list(config.folder.glob("*/dictionary"))


@pytest.mark.slow
def test_a_start_that_several_share_is_read_once(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Run(tiny_config(out=tiny_config().out + "-start"))
    start.harvest()
    start.train()
    axes = {"train": {"start_from": [start.config.out], "freeze": [["W_dec"], ["b_dec"], []]}}
    config = swept(tiny_config, **axes).model_copy(update={"harvest": start.config.harvest})
    read: list[str] = []
    monkeypatch.setattr("sae.runs.run.load", lambda place, **options: read.append(str(place)) or load(place, **options))
    for _ in range(2):
        read.clear()
        sweep(config)
        assert read.count(start.config.out) == 1


def test_two_hook_points_are_trained_in_the_same_pass(tiny_config: TinyConfig) -> None:
    hooks = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]
    config = tiny_config(
        harvest__hooks=hooks, data__tokens=2000, evaluation__tokens=64, sweep={"dictionary": {"reads": hooks}}
    )
    done = sweep(config)
    assert {point.hook for point in done.points.values()} == set(hooks)
    one = Run(variants(config)[hooks[1]].model_copy(update={"out": config.out + "-alone"})).train()
    assert torch.equal(one.W_dec, done.dictionary(hooks[1]).W_dec)


@pytest.mark.slow
def test_each_dictionary_has_a_wandb_run_of_its_own(tiny_config: TinyConfig) -> None:
    config = swept(tiny_config, dictionary={"k": [2, 4]})
    wandb = config.wandb.model_copy(update={"project": "sweeps", "mode": "offline"})
    sweep(config.model_copy(update={"wandb": wandb}))
    for name in ("k2", "k4"):
        assert len(list((Path(config.out) / name).rglob("*.wandb"))) == 1, name


@pytest.mark.slow
def test_one_that_diverged_holds_up_no_one(tiny_config: TinyConfig) -> None:
    """It has no newer checkpoint than the one before it failed; the others go on from their own."""
    config = swept(tiny_config, train={"lr": [1e-3, 2e-3]})

    def until(step: int) -> None:
        def interrupt(stage: str, done: int, of: int) -> None:
            if stage.startswith("train") and done == step * 64:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(TrainingInterrupted):
            sweep(config, interrupt)

    until(20)
    checkpoints = Path(config.out) / "lr0.002" / "checkpoints"
    shutil.copytree(checkpoints, Path(config.out) / "kept")
    until(40)
    shutil.rmtree(checkpoints)
    shutil.move(Path(config.out) / "kept", checkpoints)
    first: list[int] = []
    sweep(config, lambda stage, done, of: first.append(done) if stage.startswith("train") else None)
    assert first[:2] == [40 * 64, 50 * 64]
    assert 30 * 64 in first, "the other one goes on from its own"


def test_one_that_diverges_is_named_and_the_rest_is_compared(tiny_config: TinyConfig) -> None:
    config = swept(tiny_config, train={"lr": [1e-3, 1e30]})
    done = sweep(config)
    assert set(done.points) == {"lr0.001"}
    assert "training diverged" in done.failures["lr1e+30"]
    assert "## Not trained\n\n- lr1e+30: NaN at step" in (Path(config.out) / "sweep.md").read_text()


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_gives_the_same_weights(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = swept(tiny_config, tokens=2400, dictionary={"architecture": ALL})
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    code = f"""
import os, signal
from sae.kernels import products
from sae.training import trainer
products.cpu_has_bfloat16 = lambda: False  # as in the tests' own process
original, count = trainer.Trainer.compute, [0]
def step(self, *arguments):
    count[0] += 1
    if count[0] == 150:  # in the middle of step 25 of all six
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)
trainer.Trainer.compute = step
import sae
sae.sweep(sae.load_config({str(path)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert all(list_checkpoints(Path(config.out) / name / "checkpoints") for name in ALL)
    seen: list[int] = []
    resumed = sweep(config, lambda stage, done, of: seen.append(done) if stage.startswith("train") else None)
    assert min(seen) == 20 * 64, "it did not go on from step 20"
    whole = sweep(config.model_copy(update={"out": str(tmp_path / "whole")}))
    for name in ALL:
        for label, parameter in whole.dictionary(name).named_parameters():
            assert torch.equal(resumed.dictionary(name).get_parameter(label), parameter), (name, label)


def test_a_sweep_of_too_many_is_refused_before_one_is_made(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = list(range(1000))
    assert len(variants(swept(tiny_config, seed=seeds))) == 1000
    monkeypatch.setattr("sae.runs.variants.parse_config", lambda settings: pytest.fail("one was made"))
    config = swept(tiny_config, seed=seeds[:40], dictionary={"k": seeds[1:41]}, train={"lr": [0.01, 0.02]})
    with pytest.raises(ConfigError) as refused:
        variants(config)
    assert str(refused.value) == (
        "sweep has 3,200 combinations (40 of seed × 40 of dictionary.k × 2 of train.lr), but at most 1,000 are "
        "possible: give fewer values, or run several sweeps with one harvest.cache"
    )
