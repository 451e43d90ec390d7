"""The command line: the whole road on a tiny model, and one clear line for every kind of bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

import sae
from tests.conftest import assert_refused
from tests.support.locks import held_elsewhere


@pytest.fixture(scope="module")
def config_file(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "model": {"name": str(tiny_model)},
        "data": {
            "source": str(text_folder), "tokens": 3000, "held_out_tokens": 600, "holdout_fraction": 0.25,
            "context_length": 16,
        },
        "harvest": {"hooks": ["blocks.1.hook_resid_pre"], "shard_contexts": 32},
        "dictionary": {"d_sae": 64, "k": 4},
        "train": {"batch_size": 64, "pool_tokens": 512, "tokens": 6000, "log_every": 5, "checkpoint_every": 20},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def finished_run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in which everything is done. Read only."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    sae.run(sae.load_config(config_file, [f"out={out}"]))
    return out


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "own"))


def test_a_run_is_self_contained_and_readable(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert {"config.yaml", "activations", "dictionary", "checkpoints", "metrics.jsonl"} <= names
    assert {"eval.json", "eval.md", "features"} <= names
    resolved = sae.load_config(finished_run / "config.yaml")
    assert resolved.dictionary.k == 4
    first_line = (finished_run / "config.yaml").read_text().splitlines()[0]
    assert re.fullmatch(rf"# sae {sae.__version__}( \([0-9a-f]{{40}}\))?, torch \S+, Python \S+", first_line)
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "tokens", "loss", "mse", "fvu", "l0", "dead", "lr", "tokens_per_second"} <= set(lines[-1])
    metadata = json.loads((finished_run / "dictionary" / "config.json").read_text())["metadata"]
    assert metadata["reads"] == metadata["gives"] == [{"hook": "blocks.1.hook_resid_pre", "width": 32}]
    assert metadata["tokens"]["masked_positions"] == 1
    assert metadata["trained"]["tokens"] == 93 * 64
    assert metadata["sae_version"] == sae.__version__


def test_repeating_a_finished_run_makes_nothing_anew(config_file: Path, own_run: Path, command) -> None:
    def times() -> dict[str, int]:
        kept = list(own_run.rglob("*.safetensors"))
        return {str(path): path.stat().st_mtime_ns for path in kept}

    before = times()
    outcome = command("run", config_file, f"out={own_run}")
    assert outcome.status == 0, outcome.err
    assert "64 features in" in outcome.out
    assert times() == before


def test_eval_prints_the_table(own_run: Path, command) -> None:
    outcome = command("eval", own_run)
    assert outcome.status == 0, outcome.err
    assert "fvu" in outcome.out.lower()


def test_eval_refuses_overrides_that_it_does_not_read(command, finished_run: Path) -> None:
    assert_refused(command("eval", finished_run, "dictionary.k=8"), "evaluation does not read dictionary.k")


@pytest.mark.slow
def test_sweep_prints_its_table_and_names_its_folder(command, config_file: Path, tmp_path: Path) -> None:
    arguments = ("train.tokens=1280", "evaluation.tokens=64", "sweep.dictionary.architecture=[topk, relu]")
    outcome = command("sweep", config_file, f"out={tmp_path / 'swept'}", *arguments)
    assert outcome.status == 0, outcome.err
    assert f"2 dictionaries in {tmp_path / 'swept'}" in outcome.out
    assert "tiny, blocks.1.hook_resid_pre, 32 → 64; 1,280 tokens" in outcome.out
    assert "*: the lowest of its k" in outcome.out
    assert_refused(command("sweep", config_file, f"out={tmp_path / 'none'}"), "sweep is empty: give lists of values")
    bad = command("sweep", config_file, f"out={tmp_path / 'bad'}", "sweep.train.lr=[1e30, 1e-3]")
    assert_refused(bad, "1 of the sweep's dictionaries were not trained; sweep.md says why")
    assert "not trained: lr1e30: " in bad.out


@pytest.mark.slow
def test_eval_of_several_runs_writes_a_report_into_each(
    config_file: Path, own_run: Path, tmp_path: Path, command
) -> None:
    other = tmp_path / "other"
    outcome = command("run", config_file, f"out={other}", "seed=1", f"harvest.cache={own_run / 'activations'}")
    assert outcome.status == 0, outcome.err
    before = {run: json.loads((run / "eval.json").read_text()) for run in (own_run, other)}
    outcome = command("eval", own_run, other, "evaluation.batch_contexts=2")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("held-out tokens") == 2
    for run, alone in before.items():
        together = json.loads((run / "eval.json").read_text())
        assert together["settings"]["batch_contexts"] == 2
        assert together["dictionary"] == alone["dictionary"]
        assert together["fvu"]["value"] == pytest.approx(alone["fvu"]["value"], rel=1e-6)
        assert together["delta_ce"]["value"] == pytest.approx(alone["delta_ce"]["value"], rel=1e-3)
    assert len({report["dictionary"]["weights_sha256"] for report in before.values()}) == 2
    outcome = command("eval", "evaluation.batch_contexts=2")
    assert outcome.status == 2 and "name at least one run folder" in outcome.err


def test_features_are_listed_shown_and_written_to_a_page(own_run: Path, command, tmp_path: Path) -> None:
    listed = command("features", own_run, "--limit", 5)
    assert listed.status == 0, listed.err
    features = sae.Features(own_run)
    alive = features.sorted_by("density")[0]
    assert str(alive) in listed.out
    rare = command("features", own_run, "--max-density", features[alive].density / 2)
    assert rare.status == 0, rare.err
    assert all(line.split()[:1] != [str(alive)] for line in rare.out.splitlines())
    shown = command("features", own_run, alive)
    assert shown.status == 0, shown.err
    assert str(alive) in shown.out
    page = tmp_path / "page.html"
    assert command("features", own_run, "--page", page, "--limit", 10).status == 0
    assert page.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_verify_passes_a_good_cache_and_names_a_flipped_byte(own_run: Path, command) -> None:
    assert command("verify", own_run).status == 0
    shard = own_run / "activations" / "blocks.1.hook_resid_pre" / "train-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    outcome = command("verify", own_run)
    assert outcome.status == 1
    assert f"{shard}': damaged or changed: its SHA-256 is " in outcome.err.splitlines()[0]


def test_unknown_key(config_file: Path, command) -> None:
    assert_refused(command("run", config_file, "dictionary.kk=3"), "unknown setting", "did you mean dictionary.k?")


def test_wrong_hook(config_file: Path, tmp_path: Path, command) -> None:
    out = f"out={tmp_path / 'r'}"
    outcome = command("harvest", config_file, out, "harvest.hooks=[blocks.12.hook_resid_pre]")
    assert_refused(outcome, "hook 'blocks.12.hook_resid_pre'", "has blocks 0 to 2")
    outcome = command("harvest", config_file, out, "harvest.hooks=[blocks.1.hook_resid]")
    assert_refused(outcome, "did you mean blocks.1.hook_resid_pre?")


def test_empty_text(config_file: Path, tmp_path: Path, command) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "empty.txt").write_text("\n")
    outcome = command("harvest", config_file, f"out={tmp_path / 'r'}", f"data.source={tmp_path / 'text'}")
    assert_refused(outcome, "hold 0 tokens", "the text is empty")
    (tmp_path / "none").mkdir()
    outcome = command("harvest", config_file, f"out={tmp_path / 'r'}", f"data.source={tmp_path / 'none'}")
    assert_refused(outcome, "the folder holds no .txt")


def test_several_sources(config_file: Path, text_folder: Path, tmp_path: Path, command) -> None:
    words = tmp_path / "words"
    words.mkdir()
    for file in text_folder.iterdir():
        (words / file.name).write_text("\n".join(file.read_text().splitlines()[::-1]))
    sources, out = f"data.source=[{text_folder}, {words}]", f"out={tmp_path / 'r'}"
    outcome = command("harvest", config_file, out, sources, "data.weights=[3,1]", "data.section_characters=200")
    assert outcome.status == 0, outcome.err
    corpus, other = map(int, re.findall(r"([\d,]+) of (?:corpus|words)", outcome.out.replace(",", ""))[:2])
    assert corpus + other == 3000
    assert corpus == pytest.approx(2250, abs=100)
    assert_refused(command("harvest", config_file, out, sources), "made with data.weights=[0.75, 0.25], now [0.5, 0.5]")
    assert_refused(command("harvest", config_file, out, "data.source=[]"), "name at least one source")


def test_missing_files(config_file: Path, tmp_path: Path, command) -> None:
    assert_refused(command("run", tmp_path / "none.yaml"), "no such file")
    assert_refused(command("harvest", config_file, f"out={tmp_path / 'r'}", "data.source=./none.txt"), "no such file")
    assert_refused(command("harvest", config_file, f"out={tmp_path / 'r'}", "model.name=./none"), "no such folder")
    assert_refused(command("train", config_file, f"out={tmp_path / 'empty'}"), "make one with 'sae harvest'")
    assert_refused(command("eval", tmp_path / "no-run"), "no config.yaml there")
    assert_refused(command("verify", tmp_path / "no-cache"), "nothing there that sae wrote")


def test_k_above_the_width(config_file: Path, command) -> None:
    assert_refused(command("train", config_file, "dictionary.k=65"), "dictionary.k=65 exceeds dictionary.d_sae=64")


def test_cache_of_another_model(config_file: Path, own_run: Path, tiny_model: Path, tmp_path: Path, command) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(tiny_model, tmp_path / "other" / tiny_model.name))
    weights = load_file(other / "model.safetensors")
    first = next(name for name in weights if name.endswith("mlp.c_fc.weight"))
    weights[first] = weights[first] + 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    outcome = command("eval", own_run, f"model.name={other}")
    assert_refused(outcome, "of another model", "the weights of", "are not those it was made with")


def test_cache_of_other_settings(config_file: Path, own_run: Path, command) -> None:
    outcome = command("harvest", config_file, f"out={own_run}", "data.tokens=2000")
    assert_refused(outcome, "made with data.tokens=3000, now 2000 is asked for", "harvest.cache")


def test_dictionary_of_other_settings(config_file: Path, own_run: Path, command) -> None:
    before = (own_run / "config.yaml").read_bytes()
    outcome = command("train", config_file, f"out={own_run}", "dictionary.k=7")
    assert_refused(outcome, "made with k=4, now 7", "out=")
    assert_refused(command("run", config_file, f"out={own_run}", "seed=1"), "made with seed=0, now 1")
    shutil.rmtree(own_run / "dictionary")
    assert_refused(
        command("train", config_file, f"out={own_run}", "dictionary.k=7"), "checkpoint", "made with k=4, now 7"
    )
    assert (own_run / "config.yaml").read_bytes() == before, "a refused command changed the run's configuration"


def test_dictionary_of_other_activations(config_file: Path, own_run: Path, tmp_path: Path, command) -> None:
    """The same text with another token policy is another cache: neither dictionary nor checkpoint may pass for it."""
    other = [f"harvest.cache={tmp_path / 'other'}", "harvest.masked_positions=0", f"out={own_run}"]
    assert command("harvest", config_file, *other).status == 0
    assert_refused(command("train", config_file, *other), "made with activations=")
    shutil.rmtree(own_run / "dictionary")
    assert_refused(command("train", config_file, *other), "checkpoint", "made with activations=")


def test_a_report_cut_short_is_written_again(config_file: Path, own_run: Path, command) -> None:
    (own_run / "eval.md").unlink()
    assert command("run", config_file, f"out={own_run}").status == 0
    assert (own_run / "eval.md").is_file()


@pytest.mark.slow
def test_an_evaluation_killed_while_it_is_written_is_made_again(
    config_file: Path, own_run: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sae.files.kept.write_json", mock.Mock(side_effect=KeyboardInterrupt))
        assert command("eval", own_run, "evaluation.tokens=300").status == 130
    assert command("verify", own_run).status == 0
    assert command("run", config_file, f"out={own_run}").status == 0
    assert json.loads((own_run / "eval.json").read_text())["settings"]["tokens"] is None
    assert command("verify", own_run).status == 0


def test_a_damaged_feature_store_is_named_and_made_again_when_it_is_gone(own_run: Path, command) -> None:
    os.truncate(own_run / "features" / "features.safetensors", 100)
    assert_refused(command("features", own_run, 3), "features.safetensors': damaged", "delete features.json and run")
    (own_run / "features" / "features.json").unlink()
    assert command("features", own_run, 3).status == 0
    assert command("verify", own_run).status == 0


def test_features_can_be_looked_at_without_the_activations(own_run: Path, command) -> None:
    shutil.rmtree(own_run / "activations")
    outcome = command("features", own_run, 3)
    assert outcome.status == 0, outcome.err


def test_a_moved_run_still_works(own_run: Path, tmp_path: Path, command) -> None:
    moved = tmp_path / "2024-11-23"
    own_run.rename(moved)
    assert command("features", moved, 3).status == 0
    assert command("verify", moved).status == 0


def test_two_trainings_in_one_folder_are_refused(config_file: Path, own_run: Path, command) -> None:
    shutil.rmtree(own_run / "dictionary")
    with held_elsewhere(own_run, "training"):
        assert_refused(command("train", config_file, f"out={own_run}"), "another training is writing it")


def test_truncated_shard(config_file: Path, own_run: Path, command) -> None:
    shard = own_run / "activations" / "blocks.1.hook_resid_pre" / "train-00000.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    outcome = command("train", config_file, f"out={own_run}")
    assert_refused(outcome, "train-00000.safetensors has", "run the same 'sae harvest' to restore it")
    shard.unlink()
    assert command("harvest", config_file, f"out={own_run}").status == 0
    assert command("verify", own_run).status == 0


def test_pickle_instead_of_safetensors(own_run: Path, command) -> None:
    (own_run / "dictionary" / "weights.safetensors").write_bytes(pickle.dumps({"W_enc": [1.0]}))
    assert_refused(command("eval", own_run), "a pickle, not a safetensors file")


def test_nan_in_the_activations(config_file: Path, tiny_model: Path, tmp_path: Path, command) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["transformer.wte.weight"][5:] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    outcome = command("harvest", config_file, f"out={tmp_path / 'r'}", f"model.name={broken}")
    assert_refused(outcome, "not finite (NaN or infinity) although it computes in float32: check the model's weights")
    low = command("harvest", config_file, f"out={tmp_path / 'l'}", f"model.name={broken}", "model.dtype=bfloat16")
    assert_refused(low, "set model.dtype=float32 (it is bfloat16), and check the model's weights")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), MemoryError("Unable to allocate 4 GiB"), torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)  # fmt: skip
def test_memory_that_does_not_suffice(
    error: Exception, config_file: Path, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae.runs.run.Run.harvest", mock.Mock(side_effect=error))
    outcome = command("harvest", config_file, f"out={tmp_path / 'r'}")
    assert_refused(outcome, "Error: not enough memory", str(error), "lower harvest.batch_contexts, train.batch_size or")
    assert "unexpected" not in outcome.err


def test_unwritable_folder(config_file: Path, tmp_path: Path, command) -> None:
    (tmp_path / "file").write_text("in the way")
    outcome = command("harvest", config_file, f"out={tmp_path / 'file' / 'run'}")
    assert_refused(outcome, "cannot write", "choose another folder")


def test_unknown_feature_and_wrong_usage(own_run: Path, command) -> None:
    assert_refused(command("features", own_run, 64), "64", "0 to 63")
    outcome = command("features", own_run, "--sort", "beauty")
    assert_refused(outcome, "beauty", "density")
    assert command("frobnicate").status == 2
    assert command("features", own_run, "x").status == 2


def test_a_page_needs_the_name_of_a_file(own_run: Path, command) -> None:
    for name in ("", own_run):
        outcome = command("features", own_run, "--page", name)
        assert outcome.status == 2 and "is not a file name; give one, such as page.html" in outcome.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(("words", "unbuffered"), [(["features", "RUN"], ""), (["features", "--help"], "1")])
def test_a_standard_output_that_takes_nothing(finished_run: Path, words: list[str], unbuffered: str) -> None:
    command = [sys.executable, "-m", "sae.cli.main", *(str(finished_run) if word == "RUN" else word for word in words)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "Error: standard output cannot be written (No space left on device); redirect it elsewhere"
    ]
