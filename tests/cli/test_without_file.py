"""Commands without a configuration file or with a shipped one, and their help."""

from __future__ import annotations

from pathlib import Path

import pytest

import sae
from sae.config.file import shipped_configs
from tests.conftest import assert_refused


def test_a_run_needs_no_file(command, tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    settings = [
        f"model.name={tiny_model}", f"data.source={text_folder}", "data.tokens=600", "data.held_out_tokens=200",
        "data.context_length=16", "data.holdout_fraction=0.25", "harvest.hooks=[blocks.1.hook_resid_pre]",
        "dictionary.d_sae=64", "dictionary.k=4", "train.batch_size=64", "train.tokens=640",
    ]  # fmt: skip
    out = tmp_path / "run"
    assert command("harvest", *settings, f"out={out}").status == 0
    assert command("train", f"out={out}", *settings).status == 0
    assert sae.load(out).settings()["k"] == 4
    assert_refused(command("train", "dictionary.kk=4"), "dictionary.kk", "dictionary.k")
    assert command("train").status == 2
    file = tmp_path / "a=b.yaml"
    file.write_text("dictionary: {kk: 4}")
    assert_refused(command("train", file), "dictionary.kk")


def test_help_lists_every_key(command) -> None:
    outcome = command("train", "--help")
    assert outcome.status == 0
    for key, _, _ in sae.config.file.describe_keys():
        assert key in outcome.out, key


def test_commands_take_the_name_of_a_shipped_configuration(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["data.tokens=2000", "data.held_out_tokens=500", "harvest.cache=runs/shared"]
    assert command("harvest", "quickstart", *settings).status == 0
    assert sae.ActivationCache("runs/shared").d_in("blocks.2.hook_resid_pre") == 256
    assert_refused(command("train", "quikstart"), "did you mean 'quickstart'?")
    assert_refused(command("run", "sweep"), "train them with 'sae sweep'")


def test_help_names_the_shipped_configurations(command) -> None:
    for name in ("run", "harvest", "train", "sweep"):
        text = " ".join(command(name, "--help").out.split())
        assert "the name of a configuration that comes with sae" in text
        others = {"run": {"sweep"}, "train": {"sweep"}, "sweep": shipped_configs().keys() - {"sweep"}}.get(name, set())
        for config in shipped_configs().keys() - others:
            assert config in text.partition("KEY=VALUE sets")[0], (name, config)
