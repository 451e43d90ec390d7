"""What comes with a model stays data: no code of it runs, nothing asks, no pickle is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.hostile_model import MODEL_MAP, TOKENIZER_MAP, write_hostile_model

from sae.config.sources import ModelConfig
from sae.errors import ConfigError, ModelError
from sae.model.language_model import LanguageModel
from sae.runs import pipeline
from sae.runs.run import Run

WAY_OUT = "model.trust_remote_code=true (in Python ModelConfig(trust_remote_code=True))"
# Entries of config.json and of tokenizer_config.json, and whether the library has classes of its own for them.
HOSTILE: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "unknown model": ({"model_type": "own", "auto_map": MODEL_MAP}, {}, False),
    "known model": ({"auto_map": MODEL_MAP}, {}, True),
    "tokenizer": ({}, {"auto_map": TOKENIZER_MAP, "tokenizer_class": "OwnTokenizer"}, True),
    "tokenizer, as a list": ({}, {"auto_map": ["own.OwnTokenizer", None], "tokenizer_class": "OwnTokenizer"}, True),
    "both": ({"auto_map": MODEL_MAP}, {"auto_map": TOKENIZER_MAP}, True),
    "both unknown": ({"model_type": "own", "auto_map": MODEL_MAP}, {"auto_map": TOKENIZER_MAP}, False),
    "another repository": ({"model_type": "own", "auto_map": {"AutoConfig": "a/b--own.OwnConfig"}}, {}, False),
    "kernel from the hub": ({"attn_implementation": "kernels-community/flash-attn"}, {}, False),
}


@pytest.fixture
def hostile(tiny_model: Path, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Makes a folder, and says where its code would leave a file."""

    def make(config: dict[str, Any], tokenizer: dict[str, Any]) -> tuple[Path, Path]:
        marker = tmp_path / "ran"
        return write_hostile_model(tiny_model, tmp_path / "hostile", marker, config, tokenizer), marker

    return make


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("a prompt")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.parametrize("case", HOSTILE)
def test_no_code_of_a_folder_runs(case: str, hostile: Callable[..., Any], language_model: LanguageModel) -> None:
    config, tokenizer, known = HOSTILE[case]
    folder, marker = hostile(config, tokenizer)
    if known:
        model = LanguageModel(ModelConfig(name=str(folder)))
        assert model.info.weights_sha256 == language_model.info.weights_sha256
        assert not model.info.trust_remote_code
        assert model.info.code_sha256 is None
    else:
        with pytest.raises(ModelError) as caught:
            LanguageModel(ModelConfig(name=str(folder)))
        assert "\n" not in str(caught.value)
        assert ("auto_map" in config) == (WAY_OUT in str(caught.value)), caught.value
    assert not marker.exists()


def test_no_code_runs_for_an_architecture_that_config_json_names(
    hostile: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformer-lens imports the module of some architectures from a path that is the folder's name."""
    folder, marker = hostile({"architectures": ["InternLM2ForCausalLM"]}, {})
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ModelError, match=r"transformer-lens cannot bridge GPT2LMHeadModel|needs Python code"):
        LanguageModel(ModelConfig(name=folder.name))
    assert not marker.exists()


def test_code_asked_for_runs_and_is_recorded(hostile: Callable[..., Any], language_model: LanguageModel) -> None:
    folder, marker = hostile({"model_type": "own", "auto_map": MODEL_MAP}, {})
    model = LanguageModel(ModelConfig(name=str(folder), trust_remote_code=True))
    assert marker.is_file()
    assert model.info.trust_remote_code
    assert re.fullmatch("[0-9a-f]{64}", model.info.code_sha256 or "")
    tokens = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.logits(tokens), language_model.logits(tokens))


@pytest.mark.slow
def test_nothing_asks_on_a_terminal_that_says_yes(hostile: Callable[..., Any], tmp_path: Path) -> None:
    """In a process of its own, `yes` at the other end of the pipe."""
    folder, marker = hostile({"model_type": "own", "auto_map": MODEL_MAP}, {"auto_map": TOKENIZER_MAP})
    (tmp_path / "text.txt").write_text("One line.\n" * 50, encoding="utf-8")
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"out": "out", "model": {"name": str(folder)}, "data": {"source": "text.txt"}}), encoding="utf-8"
    )
    done = subprocess.run(
        f"yes | {sys.executable} -m sae.cli.main --quiet run c.yaml", shell=True, cwd=tmp_path,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: model {str(folder)!r}: it needs Python code")
    assert WAY_OUT in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not marker.exists()


def test_a_run_folder_cannot_allow_code(
    hostile: Callable[..., Any], tiny_config: Callable[..., Any], command: Callable[..., Any]
) -> None:
    """Every verb that opens a run folder stops, and says what to add; with it, the verb goes on."""
    folder, marker = hostile({}, {"auto_map": TOKENIZER_MAP, "tokenizer_class": "OwnTokenizer"})
    config = tiny_config(model__name=str(folder), model__trust_remote_code=True)
    run = Run(config)
    run.harvest()
    run.train()
    assert marker.is_file()
    marker.unlink()
    recorded = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    assert recorded["model"]["trust_remote_code"] is True
    code = run.cache().manifest.model["code_sha256"]
    assert re.fullmatch("[0-9a-f]{64}", code)
    assert run.cache().manifest.model["trust_remote_code"] is True
    assert run.dictionary().metadata["model"]["code_sha256"] == code
    for verb in (
        ["eval", run.folder],
        ["features", run.folder],
        ["features", run.folder, 3],
        ["effects", run.folder],
        ["probe", run.folder, "first-letters"],
        ["compare", run.folder, run.folder / "dictionary"],
        ["compare", run.folder / "dictionary", run.folder, "--on", run.folder],
    ):
        outcome = command(*verb)
        assert outcome.status == 1, verb
        assert outcome.err.startswith(f"Error: run {str(run.folder)!r}: its config.yaml has"), outcome.err
        assert "add model.trust_remote_code=true" in outcome.err
    with pytest.raises(ConfigError, match="only a record there"):
        pipeline.collect_features(run.folder)
    assert not marker.exists()
    outcome = command("features", run.folder, "model.trust_remote_code=false")
    assert outcome.status == 1
    assert f"code_sha256 is {code!r} there and None" in outcome.err
    assert not marker.exists()
    assert command("features", run.folder, "model.trust_remote_code=true", 3).status == 0


def test_overrides_of_features_are_those_of_the_run(own_features: Path, command: Callable[..., Any]) -> None:
    outcome = command("features", own_features, "features.top=3")
    assert outcome.status == 1
    assert "override 'features.top=3'" in outcome.err
    assert "it reads model., harvest.cache, device" in outcome.err
    outcome = command("features", own_features, "three")
    assert outcome.status == 2
    assert "'three' is neither a feature number nor KEY=VALUE" in outcome.err


@pytest.fixture(scope="module")
def own_features(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"name": str(tiny_model)}}), encoding="utf-8")
    return folder


def test_pickled_weights_are_refused_and_the_line_converts_them(
    tiny_model: Path, language_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(tiny_model, tmp_path / "old"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert LanguageModel(ModelConfig(name="old")).info.weights_sha256 == language_model.info.weights_sha256
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"its weights are pytorch_model.bin, and only safetensors and GGUF") as caught:
        LanguageModel(ModelConfig(name="old"))
    message = str(caught.value)
    assert "\n" not in message
    exec(message.partition('python -c "')[2].partition('"')[0])
    name = message.rpartition("model.name=")[2]
    assert LanguageModel(ModelConfig(name=name)).info.weights_sha256 == language_model.info.weights_sha256


@pytest.mark.parametrize("by", ["index", "config"])
def test_an_index_cannot_name_a_pickle(by: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "sharded"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({"unused": torch.zeros(1)}, folder / "other.safetensors")
    if by == "index":
        torch.save(weights, folder / "weights.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "weights.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    else:
        torch.save(weights, folder / "adapter_model.bin")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ModelError, match="only safetensors and GGUF are read, since a pickle can run code"):
        LanguageModel(ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, x: {} if ".h.1." in name else {name: x},
            r"its files lack 12 of the tensors of GPT2LMHeadModel \(transformer\.h\.1\.\S+, \S+, …\): they would be "
            "random numbers; check that the files are complete",
        ),
        (
            lambda name, x: {f"module.{name}": x},
            r"its files lack \d+ of the tensors of GPT2LMHeadModel .* and hold \d+ that it does not have \(module\.",
        ),
    ],
    ids=["a block", "all, by another name"],
)
def test_weights_that_are_not_there_are_not_made_up(
    change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    changed = {name: x for old, tensor in weights.items() for name, x in change(old, tensor).items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        LanguageModel(str(folder))


def test_what_a_file_holds_beyond_the_model_does_no_harm(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "vision.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert LanguageModel(str(folder)).info.weights_sha256 == LanguageModel(str(tiny_model)).info.weights_sha256


def test_a_file_of_weights_alone_is_no_model(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"a file with weights only; give the folder that its config.json is in"):
        LanguageModel(ModelConfig(name=str(tiny_model / "model.safetensors")))


def test_the_hub_is_not_asked_about_a_folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything installed for it: transformer-lens looks up processors of images by the folder's name."""
    from transformer_lens.model_bridge.sources.transformers import source

    def look_up(*_: object) -> None:
        raise AssertionError("a processor was looked up")

    monkeypatch.setattr(source, "load_modality_processor", look_up)
    assert LanguageModel(ModelConfig(name=str(tiny_model))).info.name == tiny_model.name
    assert source.load_modality_processor is look_up


@pytest.mark.parametrize(("bars", "hub_bars"), [(True, True), (False, False), (True, False), (False, True)])
def test_loading_leaves_the_libraries_messages_as_they_were(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, bars: bool, hub_bars: bool
) -> None:
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    def state() -> tuple[int, bool, bool]:
        return logging.get_verbosity(), logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()

    before = state()
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    try:
        logging.set_verbosity_info()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (hub.enable_progress_bars if hub_bars else hub.disable_progress_bars)()
        LanguageModel(ModelConfig(name=str(tiny_model)))
        assert state() == (20, bars, hub_bars)
        with pytest.raises(ModelError):
            LanguageModel(ModelConfig(name="./no such model"))
        assert state() == (20, bars, hub_bars)
        assert "TRANSFORMERS_VERBOSITY" not in os.environ
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()
        (hub.enable_progress_bars if before[2] else hub.disable_progress_bars)()


@pytest.mark.slow
def test_the_first_loading_of_a_process_does_so_too(tiny_model: Path) -> None:
    """Importing libraries has effects as well."""
    code = f"""
import sae
sae.LanguageModel({str(tiny_model)!r})
from transformers.utils import logging
print(logging.get_verbosity(), logging.is_progress_bar_enabled())
"""
    quiet = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert (done.stdout, done.stderr) == ("30 True\n", ""), done
