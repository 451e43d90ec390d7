"""Models on a machine without transformer-lens: what works there, and what says that it needs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from families import write_model
from family_configs import FAMILIES

from sae.activations.harvest import harvest
from sae.cli.main import cli
from sae.config.sources import ModelConfig
from sae.errors import ModelError
from sae.model.hook_probe import perturbed
from sae.model.info import model_shape
from sae.model.language_model import LanguageModel
from tests.support.harvest_case import Config, contents

KINDS = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]


@pytest.fixture(autouse=True)
def without_transformer_lens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "language_model" in request.fixturenames:  # which is loaded with it
        request.getfixturevalue("language_model")
    monkeypatch.setitem(sys.modules, "transformer_lens", None)


@pytest.fixture
def bare(without_transformer_lens: None, tiny_model: Path) -> LanguageModel:
    return LanguageModel(str(tiny_model))


def test_identity_and_activations_are_the_same(bare: LanguageModel, language_model: LanguageModel) -> None:
    assert not bare.has_bridge
    assert bare.info == language_model.info
    assert bare.rows == language_model.rows
    names = [f"blocks.{block}.{kind}" for block in range(3) for kind in KINDS]
    assert [hook.name for hook in bare.hooks()] == names
    tokens = bare.probe_tokens(3, 17)
    ours, theirs = bare.activations(tokens, names), language_model.activations(tokens, names)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_logits_and_replacements_are_the_same(bare: LanguageModel, language_model: LanguageModel) -> None:
    tokens = bare.probe_tokens(3, 17)
    bare.check_causal()
    torch.testing.assert_close(bare.logits(tokens), language_model.logits(tokens), rtol=1e-5, atol=1e-4)
    for hook in (hook.name for hook in bare.hooks()):
        with bare.replacing(hook, perturbed), language_model.replacing(hook, perturbed):
            ours, theirs = bare.logits(tokens), language_model.logits(tokens)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert (ours - bare.logits(tokens)).abs().max() > 0.05, hook


def test_a_harvest_has_the_same_bytes(
    bare: LanguageModel, language_model: LanguageModel, tiny_config: Config, tmp_path: Path
) -> None:
    """Begun there and continued here."""
    hooks = ["blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out"]
    folders = [
        harvest(tiny_config(harvest__hooks=hooks, out=str(tmp_path / str(number))), model).path
        for number, model in enumerate((bare, language_model))
    ]
    assert contents(folders[0]) == contents(folders[1])
    lost = folders[0] / "blocks.2.hook_mlp_out/train-00003.safetensors"
    lost.unlink()
    harvest(tiny_config(harvest__hooks=hooks, out=str(tmp_path / "0")), language_model)
    assert contents(folders[0]) == contents(folders[1])


def test_what_needs_it_says_so(bare: LanguageModel, tiny_model: Path) -> None:
    hook = "blocks.1.hook_resid_pre"
    needs = (
        r"model 'tiny': this needs transformer-lens: pip install 'sae\[lm\]' \(without it, harvesting, training, splic"
    )
    for action in (bare.unembedding, lambda: bare.tail(hook), lambda: bare.road(hook)):
        with pytest.raises(ModelError, match=needs):
            action()
    lacking = r"has no attn\.hook_z; it has hook_resid_pre, hook_attn_out, .*; others may need transformer-lens: pip"
    with pytest.raises(ModelError, match=lacking):
        bare.activations(bare.probe_tokens(1, 4), "blocks.1.attn.hook_z")
    with pytest.raises(ModelError, match=r"without transformer-lens, .*weight_processing=fold_ln.*: pip install 'sae"):
        LanguageModel(ModelConfig(name=str(tiny_model), weight_processing="fold_ln"))


def test_the_command_lists_what_can_be_read(tiny_model: Path) -> None:
    result = CliRunner().invoke(cli, ["hooks", str(tiny_model), "device=cpu"])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines()[2:]}
    assert list(rows) == KINDS
    assert all(" yes " in row for row in rows.values())


@pytest.mark.parametrize("family", ["bloom", "opt", "mamba", "mpt"])
def test_the_shape_of_a_model_is_the_bridge_s(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_shape(family, tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_shape_of_all_families_is_the_bridge_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES:
        check_shape(family, tmp_path, monkeypatch)


def check_shape(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = LanguageModel(str(write_model(family, folder / family)))
    shape = model.info.d_model, model.info.n_layers, model.info.max_context
    assert model_shape(None, model._native, model.bridge.original_model.config) == shape, family


SCRIPT = """
import sys
sys.modules["transformer_lens"] = None  # its import fails, as if it were not installed
from sae.cli.main import main
sys.argv = ["sae", "--quiet", *sys.argv[1:]]
main()
"""


def test_commands_harvest_and_train(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    """And evaluation stops with one line."""
    settings = {
        "out": tmp_path / "run", "model.name": tiny_model, "data.source": text_folder, "data.tokens": 1000,
        "data.held_out_tokens": 200, "data.holdout_fraction": 0.25, "data.context_length": 16,
        "harvest.hooks": "[blocks.1.hook_mlp_out]", "harvest.dtype": "float32", "dictionary.d_sae": 64,
        "dictionary.k": 4, "train.tokens": 640, "train.batch_size": 64, "device": "cpu",
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in settings.items()]

    def sae(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    for verb in ("harvest", "train"):
        result = sae(verb, *words)
        assert result.returncode == 0, result.stderr[-2000:]
    manifest = json.loads((tmp_path / "run/activations/manifest.json").read_bytes())
    assert manifest["complete"]
    assert manifest["model"]["reader"] == "transformers"
    result = sae("eval", str(tmp_path / "run"))
    assert result.returncode == 1
    [line] = result.stderr.strip().splitlines()
    assert "needs transformer-lens: pip install 'sae[lm]'" in line
