"""`sae convert` writes dictionaries in other formats, and says what is folded and lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sae
from tests.conftest import Command, assert_refused
from tests.support.foreign_files import CASES


def test_there_and_back(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = CASES["llama scope"].write(tmp_path / "theirs")
    first = command("convert", theirs, "ours")
    assert first.status == 0, first.err
    assert first.out.splitlines()[0] == "Llama Scope → sae, in 'ours'"
    assert [line.partition(":")[0] for line in first.out.splitlines()[1:]] == ["  folded into the weights"] * 3
    second = command("convert", "ours", "saelens", "--to", "saelens")
    assert second.status == 0, second.err
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(sae.load("saelens")(x), sae.load(theirs)(x), rtol=1e-12, atol=1e-12)
    assert "Llama Scope" in command("info", "ours").out


def test_errors_are_one_line_and_write_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sae.ReLU(4, 8).save("ours")
    assert_refused(command("convert", "ours", "ours", "--to", "saelens"), "'ours': already there; give a new folder")
    assert_refused(command("convert", "ours", "new", "--to", "sparsify"), "has only TopK; this is a ReLU")
    assert_refused(command("convert", "ours", "new", "--to", "other"), "format 'other': written are sae, saelens")
    assert_refused(command("convert", "nowhere", "new"), "no config.json there")
    assert not Path("new").exists()
