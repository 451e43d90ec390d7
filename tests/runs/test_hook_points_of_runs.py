"""Which hook points a run reads and gives: transcoders in every step, patterns of names, several at once refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sae
from sae.config.file import load_config
from sae.config.patterns import has_patterns, with_hook_points
from sae.config.settings import RunConfig
from sae.dictionary.frame import Frame
from sae.errors import CacheError, ConfigError, ModelError
from sae.runs.comparison import compare_folders
from sae.runs.folder import check_run
from sae.runs.pipeline import run
from sae.runs.run import Run
from sae.runs.sweeping import sweep
from sae.runs.variants import variants
from sae.training.loop import train

READS, GIVES = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"
NAMES = [f"blocks.{block}.{kind}" for block in range(3) for kind in ("hook_resid_pre", "hook_mlp_out")]
TinyConfig = Callable[..., RunConfig]


def settings(**more: Any) -> dict[str, Any]:
    return {"data__tokens": 2000, "evaluation__tokens": 64, "features__tokens": 512, **more}


@pytest.fixture
def transcoder(tiny_config: TinyConfig) -> RunConfig:
    sides = {"dictionary__reads": READS, "dictionary__gives": GIVES}
    return tiny_config(**settings(harvest__hooks=[READS, GIVES], **sides))


def test_a_transcoder_takes_every_step_of_a_run(transcoder: RunConfig, tmp_path: Path) -> None:
    finished = run(transcoder)
    dictionary = finished.dictionary()
    assert (dictionary.origin.reads.hook, dictionary.origin.gives.hook) == (READS, GIVES)
    cache = finished.cache()
    source, target = finished.sources(cache, (READS, GIVES)).values()
    alone = train(source, transcoder.dictionary, transcoder.train, target=target, seed=transcoder.seed)
    assert torch.equal(alone.W_dec, dictionary.W_dec)
    report = sae.evaluate(dictionary, cache, language_model=finished.language_model, settings=transcoder.evaluation)
    stored = yaml.safe_load((finished.folder / "eval.json").read_text())
    assert stored["hook"] == GIVES
    assert stored["dictionary"]["reads"] == READS
    for metric in ("fvu", "l0", "delta_ce"):
        assert stored[metric] == json.loads(json.dumps(report.to_json()[metric])), metric
    assert finished.features().info["hook"] == READS
    assert finished.is_evaluated()
    check_run(finished.folder)
    name = sorted(path.name for path in (finished.folder / "checkpoints").iterdir())[0]
    again = compare_folders([finished.folder, Path(transcoder.out) / "checkpoints" / name])
    assert again.hook == GIVES


def test_a_finished_transcoder_is_not_another_dictionary(transcoder: RunConfig) -> None:
    first = Run(transcoder)
    first.harvest()
    before = first.train()
    assert torch.equal(Run(transcoder).train().W_dec, before.W_dec)
    sae_config = transcoder.model_copy(update={"dictionary": transcoder.dictionary.model_copy(update={"gives": None})})
    with pytest.raises(sae.SaeError, match=f"made with gives='{GIVES}', now '{READS}' is asked for"):
        Run(sae_config).train()


def test_a_target_before_its_input_is_refused(tiny_config: TinyConfig) -> None:
    sides = {"dictionary__reads": GIVES, "dictionary__gives": READS}
    backwards = Run(tiny_config(**settings(harvest__hooks=[READS, GIVES], **sides)))
    with pytest.raises(ConfigError, match=f"target hook '{READS}' comes before '{GIVES}'.*swap them"):
        backwards.check()


@pytest.mark.parametrize("live", [False, True])
def test_a_target_may_have_another_width_and_a_skip_connection(tiny_config: TinyConfig, live: bool) -> None:
    wider = "blocks.2.mlp.hook_post"
    sides = {"dictionary__reads": READS, "dictionary__gives": wider, "dictionary__skip": True}
    config = tiny_config(**settings(harvest__hooks=[READS, wider], harvest__live=live, train__tokens=640, **sides))
    started = Run(config)
    started.check()
    started.check_space()
    cache = started.harvest()
    made = started.train()
    assert (made.d_in, made.d_out, made.frame) == (32, cache.d_in(wider), Frame(skip=True, d_out=cache.d_in(wider)))
    assert made.d_out > made.d_in
    assert (made.origin.reads.width, made.origin.gives.width) == (made.d_in, made.d_out)
    assert made.metadata["trained"]["settings"]["skip"] is True
    assert torch.equal(Run(config).train().W_dec, made.W_dec)
    without = config.model_copy(update={"dictionary": config.dictionary.model_copy(update={"skip": False})})
    with pytest.raises(sae.SaeError, match="made with skip=True, now False is asked for"):
        Run(without).train()


def test_an_autoencoder_with_a_skip_connection_is_refused_before_the_harvest(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match=r"dictionary.skip=true: an autoencoder would learn to copy its input"):
        Run(tiny_config(**settings(dictionary__skip=True))).check()


def test_a_dictionary_that_was_trained_before_skip_existed_counts_as_without(transcoder: RunConfig) -> None:
    first = Run(transcoder)
    first.harvest()
    before = first.train()
    path = first.folder / "dictionary" / "config.json"
    record = json.loads(path.read_text())
    del record["metadata"]["trained"]["settings"]["skip"]
    path.write_text(json.dumps(record))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (path.parent / "SHA256SUMS").unlink()
        assert torch.equal(Run(transcoder).train().W_dec, before.W_dec)


@pytest.mark.parametrize("live", [False, True])
def test_a_transcoder_of_every_block_in_one_pass(tiny_config: TinyConfig, live: bool) -> None:
    """The patterns are paired by block, whatever the order of the harvest; each dictionary is as if trained alone."""
    reads, gives = [f"blocks.{n}.mlp.hook_in" for n in (0, 1, 2)], [f"blocks.{n}.hook_mlp_out" for n in (0, 1, 2)]
    live_settings = {"harvest__live": True, "harvest__sample_tokens": 500} if live else {}
    shared = settings(
        harvest__hooks=[*reads[::-1], *gives], train__tokens=320, evaluation__frozen_decoder_tokens=0, **live_settings
    )
    pairs = {"dictionary": {"reads": ["blocks.*.mlp.hook_in"], "gives": ["blocks.*.hook_mlp_out"]}}
    config = tiny_config(**shared, sweep=pairs)
    done = sweep(config)
    assert [point.hook for point in done.points.values()] == [f"{a} → {b}" for a, b in zip(reads, gives, strict=True)]
    assert ", 32 → 64 → 32; " in done.of
    made = done.dictionary(f"{reads[1]}-{gives[1]}")
    assert (made.origin.reads.hook, made.origin.gives.hook) == (reads[1], gives[1])
    alone = tiny_config(
        **shared, out=str(Path(config.out).with_name("alone")), dictionary__reads=reads[1], dictionary__gives=gives[1],
    )  # fmt: skip
    alone = alone.model_copy(update={"harvest": alone.harvest.model_copy(update={"cache": str(config.cache_folder)})})
    assert torch.equal(Run(alone).train().W_dec, made.W_dec)


def test_sides_of_different_lengths_are_not_paired(tiny_config: TinyConfig) -> None:
    config = tiny_config(sweep={"dictionary": {"reads": [NAMES[0], NAMES[2]], "gives": [NAMES[1]], "k": [2, 4]}})
    message = r"sweep.dictionary.reads has 2 and sweep.dictionary.gives has 1 hook points: they are paired"
    with pytest.raises(ConfigError, match=message):
        variants(config)


def test_pairs_are_combined_with_everything_else(tiny_config: TinyConfig) -> None:
    """Named by the values in the order in which they are written, as before hook points were paired."""
    hooks = {"harvest__hooks": NAMES}
    sides = {"dictionary": {"gives": [NAMES[1], NAMES[3]], "k": [2, 4], "reads": [NAMES[0], NAMES[2]]}, "seed": [7]}
    made = variants(tiny_config(**hooks, sweep=sides))
    assert list(made) == [f"{gives}-k{k}-{reads}-seed7" for reads, gives in zip(NAMES[0:4:2], NAMES[1:4:2], strict=True)
                          for k in (2, 4)]  # fmt: skip
    assert {(v.dictionary.reads, v.dictionary.gives) for v in made.values()} == {tuple(NAMES[:2]), tuple(NAMES[2:4])}
    one_side = tiny_config(**hooks, dictionary__reads=NAMES[0], sweep={"dictionary": {"gives": [NAMES[1], NAMES[3]]}})
    assert [(v.dictionary.reads, v.dictionary.gives) for v in variants(one_side).values()] == [
        (NAMES[0], NAMES[1]), (NAMES[0], NAMES[3]),
    ]  # fmt: skip


def test_patterns_stand_for_the_model_s_hook_points_or_the_cache_s(
    tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern = "blocks.[12].hook_resid_pre"
    config = tiny_config(**settings(harvest__hooks=[pattern], sweep={"dictionary": {"reads": [pattern]}}))
    done = sweep(config)
    hooks = {"blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"}
    assert {point.hook for point in done.points.values()} == hooks == set(done.points)
    assert set(Run(config).config.harvest.hooks) == hooks
    wider = config.model_copy(
        update={"harvest": config.harvest.model_copy(update={"hooks": ("blocks.*.hook_resid_pre",)})}
    )
    with pytest.raises(CacheError, match=r"made with harvest\.hooks="):
        Run(wider).harvest()
    notes: list[str] = []

    def no_model(*_: object) -> None:
        raise ModelError("transformer-lens is not installed")

    monkeypatch.setattr("sae.runs.run.LanguageModel", no_model)
    monkeypatch.setattr("sae.runs.run.announce", lambda _, *lines: notes.extend(lines))
    cached = Run(config)
    assert set(cached.config.harvest.hooks) == hooks
    assert notes == [
        f"patterns stand for hook points of cache '{config.cache_folder}', since transformer-lens is not installed"
    ]
    cached.say_hook()
    assert notes[1:] == []
    Run(config.model_copy(update={"sweep": {}})).say_hook()
    assert "training on blocks.1.hook_resid_pre, the first of 2 hook points in harvest.hooks" in notes[-1]
    recorded = load_config(Path(config.out) / "blocks.2.hook_resid_pre" / "config.yaml")
    assert recorded.dictionary.reads == "blocks.2.hook_resid_pre"


PATTERNS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "every block": (["harvest.hooks=blocks.*.hook_mlp_out"], NAMES[1::2], ["blocks.0.hook_mlp_out"]),
    "some blocks": (["harvest.hooks=['blocks.[1-2].hook_mlp_out']"], NAMES[3::2], ["blocks.1.hook_mlp_out"]),
    "a pattern and a name": (["harvest.hooks=[blocks.2.hook_mlp_out, blocks.*.hook_mlp_out]"],
                             [NAMES[5], NAMES[1], NAMES[3]], [NAMES[5]]),
    "one that reads": (["harvest.hooks=blocks.?.*", "dictionary.reads=blocks.2.*pre"], NAMES, [NAMES[4]]),
    "none": (["harvest.hooks=blocks.2.hook_mlp_out"], [NAMES[5]], [NAMES[5]]),
}  # fmt: skip


@pytest.mark.parametrize("case", PATTERNS)
def test_a_pattern_stands_for_all_that_match_in_their_order(case: str) -> None:
    words, harvested, trained = PATTERNS[case]
    config = with_hook_points(load_config(None, words), lambda: NAMES)
    assert list(config.harvest.hooks) == harvested
    assert list(config.hooks) == trained


def test_names_are_asked_for_only_if_they_are_needed() -> None:
    def asked() -> list[str]:
        raise AssertionError("the model would be loaded")

    assert with_hook_points(load_config(None, ["seed=3"]), asked) == load_config(None, ["seed=3"])
    hooks = "harvest.hooks=[blocks.0.hook_mlp_out, blocks.1.hook_mlp_out]"
    with pytest.raises(ConfigError, match=r"dictionary.reads: no hook point matches 'blocks.7.\*'; there are blocks.0"):
        with_hook_points(load_config(None, [hooks, "dictionary.reads=blocks.7.*"]), asked)


REFUSED: dict[str, tuple[list[str], str]] = {
    "nothing matches": (["harvest.hooks=blocks.9.*"], "harvest.hooks: no hook point matches 'blocks.9.*'; 'sae hooks"),
    "a pattern of several": (
        ["harvest.hooks=blocks.*.hook_resid_pre", "dictionary.gives=blocks.*.hook_resid_pre"],
        "dictionary.gives names 3 hook points",
    ),
    "not harvested": ([f"dictionary.gives={NAMES[5]}"], "dictionary.gives='blocks.2.hook_mlp_out' is not harvested"),
    "an empty list": (["dictionary.reads=[]"], r"dictionary.reads or dictionary.gives is \[\]: expected a hook point"),
    "a number": (["dictionary.gives=[3]"], r"dictionary.reads or dictionary.gives is \[3\]: expected a hook point"),
    "a pattern without quotes": (["harvest.hooks=[*.hook_mlp_out]"], "a pattern of hook points goes in quotes"),
    "the old key": ([f"dictionary.hook={NAMES[0]}"], "'dictionary.hook' is called 'dictionary.reads' now"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hook_points_that_cannot_be_trained_on_are_refused(case: str) -> None:
    words, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        with_hook_points(load_config(None, words), lambda: NAMES)


@pytest.mark.parametrize("swept", [None, 5, [1]])
def test_a_sweep_that_is_no_section_is_refused_as_before(swept: Any) -> None:
    config = load_config(None, ["harvest.hooks=blocks.2.hook_mlp_out"]).model_copy(
        update={"sweep": {"dictionary": swept}}
    )
    assert not has_patterns(config)
    assert with_hook_points(config, lambda: NAMES).sweep == {"dictionary": swept}


def test_lists_of_hook_points_in_a_sweep_stay_lists() -> None:
    lists = [[NAMES[1], NAMES[3]], "blocks.2.*"]
    config = load_config(None, ["harvest.hooks=blocks.*.hook_mlp_out"]).model_copy(
        update={"sweep": {"dictionary": {"reads": lists}}}
    )
    assert with_hook_points(config, lambda: NAMES).sweep["dictionary"]["reads"] == [lists[0], NAMES[5]]


def test_a_list_of_one_is_that_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "harvest: {hooks: [blocks.0.hook_mlp_out, blocks.1.hook_mlp_out]}\n"
        "dictionary: {reads: [blocks.1.hook_mlp_out]}\n"
    )
    assert load_config(path).dictionary.reads == "blocks.1.hook_mlp_out"
