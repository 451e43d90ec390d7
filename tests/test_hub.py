"""The hub's names in processes of their own, answered by a server on this machine: what works, and what goes wrong."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file
from support.loopback_hub import Fault, LoopbackHub, loopback_hub

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "gpt2-small.yaml"
SETTINGS = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
COMMIT, DATA, TAG = SETTINGS["model"]["revision"], SETTINGS["data"]["source"], SETTINGS["data"]["revision"]
CARD = b"""---
configs:
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
"""

SMALL = [
    "device=cpu", "data.tokens=4000", "data.held_out_tokens=600", "data.holdout_fraction=0.2",
    "data.context_length=32", "harvest.batch_contexts=8", "harvest.shard_contexts=32", "dictionary.d_sae=64",
    "dictionary.k=4", "train.batch_size=128", "train.tokens=8000", "evaluation.tokens=200",
    "evaluation.downstream_tokens=100", "evaluation.legacy_tokens=0", "evaluation.frozen_decoder_tokens=0",
    "features.tokens=500",
]  # fmt: skip
"""Settings that make the main configuration a matter of seconds."""


@pytest.fixture(scope="module")
def gpt2(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve random blocks of GPT-2's class, sixteen wide, with the tiny model's tokenizer."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(n_embd=16, n_layer=12, n_head=2, n_positions=128, vocab_size=len(tokenizer),
                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(gpt2: Path, text_folder: Path) -> Iterator[LoopbackHub]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())]
    with loopback_hub() as server:
        server.add("models", "gpt2", gpt2, commit=COMMIT)
        files = {"README.md": CARD}
        for number in range(2):
            buffer = io.BytesIO()
            parquet.write_table(pa.table({"text": texts[number::2], "id": list(range(len(texts[number::2])))}), buffer)
            files[f"sample/10BT/00{number}_00000.parquet"] = buffer.getvalue()
        server.add("datasets", DATA, files, revisions=("main", TAG))
        yield server


def process(hub: LoopbackHub, home: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process for which `hub` is the hub; Hugging Face's caches are in `home`."""
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, check=False, cwd=home,
        env={**os.environ, **hub.environment(home / "hf"), **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_the_main_configuration_runs_from_its_names_over_a_bad_line(hub: LoopbackHub, tmp_path: Path) -> None:
    """A download that breaks off is tried again; too many requests are waited for."""
    hub.faults = [
        Fault("drop", f"gpt2/resolve/{COMMIT}/model.safetensors", after=5000),
        Fault("429", f"gpt2/resolve/{COMMIT}/model.safetensors"),
        Fault("429", f"datasets/{DATA}/tree"),
    ]
    done = process(hub, tmp_path, "-m", "sae.cli.main", "--quiet", "run", str(CONFIG), *SMALL, "out=run")
    assert done.returncode == 0, done.stderr
    assert [fault for fault in hub.faults if fault.times] == []
    manifest = json.loads((tmp_path / "run" / "activations" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["model"]["name"], manifest["model"]["revision"]) == ("gpt2", COMMIT)
    assert (manifest["data"]["source"], manifest["data"]["revision"]) == (DATA, TAG)
    assert manifest["rows"] == {"train": 4000, "held_out": 600}
    assert load_file(tmp_path / "run" / "dictionary" / "weights.safetensors")["W_enc"].shape == (16, 64)
    downloads = [line for line in hub.requests if line.startswith("GET") and "model.safetensors" in line]
    assert len(downloads) == 2, "the one that broke off, and the whole one"
    assert not [line for line in hub.requests if ".bin" in line or (".py" in line and "GET" in line)]


@pytest.mark.slow
def test_the_main_configuration_runs_without_a_cache(hub: LoopbackHub, tmp_path: Path) -> None:
    live = ["harvest.live=true", "harvest.sample_tokens=1000"]
    done = process(hub, tmp_path, "-m", "sae.cli.main", "--quiet", "run", str(CONFIG), *SMALL, *live, "out=run")
    assert done.returncode == 0, done.stderr
    shards = (tmp_path / "run" / "activations" / "blocks.8.hook_resid_pre").iterdir()
    assert sorted(path.name for path in shards) == ["held_out-00000.safetensors", "train-00000.safetensors"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["tokens"] == 8000 // 128 * 128
    assert json.loads((tmp_path / "run" / "eval.json").read_text(encoding="utf-8"))["hook"] == "blocks.8.hook_resid_pre"


BROKEN_STREAM = """
import os, sys, time, urllib.request
time.sleep = lambda seconds: None  # between the libraries' own tries, which take minutes
from sae.runs import pipeline
from sae.config.file import load_config
from sae.errors import SaeError
overrides = sys.argv[2:]
try:
    pipeline.harvest(load_config(sys.argv[1], [*overrides, "out=broken"]))
except SaeError as error:
    print(error)
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/heal").read()
pipeline.harvest(load_config(sys.argv[1], [*overrides, "out=broken"]))
pipeline.harvest(load_config(sys.argv[1], [*overrides, "out=whole"]))
"""


@pytest.mark.slow
def test_a_stream_that_breaks_off_goes_on_with_the_next_run(hub: LoopbackHub, tmp_path: Path) -> None:
    """Byte for byte as if nothing had happened."""
    hub.faults = [Fault("drop", "001_00000.parquet", times=-1, after=3000)]
    small = ["device=cpu", "data.tokens=6000", "data.held_out_tokens=600", "data.holdout_fraction=0.2",
             "data.context_length=32", "harvest.shard_contexts=32", "data.streaming=true"]  # fmt: skip
    done = process(hub, tmp_path, "-c", BROKEN_STREAM, str(CONFIG), *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"data source {DATA!r}: row 30 could not be read ("), done.stdout
    assert "run the same command again to continue" in done.stdout
    assert done.stdout.count("\n") == 1
    folders = [tmp_path / name / "activations" for name in ("broken", "whole")]
    contents = [{p.name: p.read_bytes() for p in folder.rglob("*.safetensors")} for folder in folders]
    assert contents[0] == contents[1]
    assert len(contents[0]) > 4


ERRORS = """
import sys, json, time
time.sleep = lambda seconds: None  # between the libraries' own tries
from sae.config.sources import DataConfig, ModelConfig
from sae.text.corpus import read_documents
from sae.errors import SaeError
from sae.model.loading import load_pretrained
for case in json.loads(sys.argv[1]):
    try:
        if "name" in case:
            load_pretrained(ModelConfig(**case))
        else:
            next(read_documents(**case))
        print("no error")
    except SaeError as error:
        print(error)
"""


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line_with_the_way_out(hub: LoopbackHub, gpt2: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in gpt2.iterdir()}
    hub.add("models", "org/gated", gpt2, gated=True)
    pickled = {("pytorch_model.bin" if name == "model.safetensors" else name): files[name] for name in files}
    hub.add("models", "org/pickled", pickled)
    config = {**json.loads(files["config.json"]), "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n".encode()
    hub.add("models", "org/hostile", {**files, "config.json": json.dumps(config).encode(), "own.py": code})
    hub.add("datasets", "org/script", {"script.py": code, "README.md": b""})
    cases = [
        {"name": "gpt2", "revision": "none"},
        {"name": "org/gated"},
        {"name": "org/nothing"},
        {"name": "org/pickled"},
        {"name": "org/hostile"},
        {"source": DATA, "subset": "sample-10BT", "revision": "none"},
        {"source": "org/nothing"},
        {"source": "org/script"},
    ]
    done = process(hub, tmp_path, "-c", ERRORS, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "model 'gpt2': the hub has 'gpt2', but not that revision: check model.revision"
    assert lines[1].startswith("model 'org/gated': access to 'org/gated' is restricted on the hub: ask for it on its")
    assert "set HF_TOKEN" in lines[1]
    assert lines[2].startswith("model 'org/nothing': neither a folder nor a file here, and the hub has no model 'org/n")
    assert "its weights are not there as safetensors on the hub" in lines[3]
    assert "t.AutoModelForCausalLM" in lines[3]
    assert "needs Python code that comes with it, which was not run" in lines[4]
    assert lines[5] == f"data source {DATA!r}: the hub has {DATA!r}, but not that revision: check data.revision"
    assert lines[6].startswith("data source 'org/nothing': neither a folder nor a file here, and the hub has no data")
    assert "Dataset scripts are no longer supported" in lines[7]
    assert len(lines) == len(cases)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_out_of_reach(offline: str, hub: LoopbackHub, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    cases = json.dumps([{"name": "gpt2"}, {"source": DATA}])
    done = process(hub, tmp_path, "-c", ERRORS, cases, HF_ENDPOINT=url, HF_HUB_OFFLINE=offline)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        if offline == "1":
            assert "with offline mode on" in line
            assert "unset it to download" in line
        else:
            assert f"the hub at {url} cannot be reached: check the network" in line
            assert "HF_HUB_OFFLINE=1 uses what was downloaded before" in line
