"""Commands without a configuration file, and their help."""

from __future__ import annotations

from pathlib import Path

import sae
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
