"""Dictionaries by name, from a hub on this machine, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.loopback_hub import Fault, LoopbackHub, loopback_hub

import sae
from tests.support.foreign_files import CASES

D_IN, D_SAE = 64, 32768
HOOK = "blocks.8.hook_resid_pre"
JB = "jbloom/GPT2-Small-SAEs-Reformatted"
WEIGHTS = 4 * (2 * D_IN * D_SAE + D_SAE + D_IN)
"""Bytes of numbers in the file of weights."""
PIECE = 10 << 20
"""Bytes that the hub's library writes at once: what breaks off within them is asked for again."""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as server:
        yield server


@pytest.fixture(scope="module")
def dictionary() -> sae.TopK:
    generator = torch.Generator().manual_seed(5)
    dictionary = sae.TopK(D_IN, D_SAE, k=8, metadata={"hook": HOOK, "model": {"name": "gpt2", "weights_sha256": "ab"}})
    for parameter in dictionary.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    dictionary.normalise_decoder_()
    return dictionary


@pytest.fixture(scope="module")
def saved(dictionary: sae.TopK, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    dictionary.save(folder / "here")
    return folder / "here"


RUN = """
import json, sys, time
time.sleep = lambda seconds: None  # between the libraries' own tries
import torch, sae
for name in sys.argv[1:]:
    try:
        d = sae.load(name)
    except sae.SaeError as error:
        print(type(error).__name__, error)
    else:
        torch.save(dict(d.state_dict()), "loaded.pt")
        print(json.dumps(d.metadata))
"""


def process(hub: LoopbackHub, home: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process for which `hub` is the hub."""
    home.mkdir(exist_ok=True)
    settings = {**os.environ, **hub.environment(home / "hf"), "OMP_NUM_THREADS": "1", **environment}
    settings = {name: value for name, value in settings.items() if value}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False, cwd=home, env=settings
    )  # fmt: skip


def load(hub: LoopbackHub, home: Path, *names: str, **environment: str) -> list[str]:
    """For each name, the loaded dictionary's metadata as JSON, or the error's class and text; one line each."""
    done = process(hub, home, "-c", RUN, *names, **environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(names), done.stdout
    return done.stdout.splitlines()


def got(hub: LoopbackHub, part: str = "") -> list[str]:
    """Requests for contents of files."""
    return [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line and part in line]


def test_a_name_loads_to_the_last_bit_with_its_commit(
    hub: LoopbackHub, saved: Path, dictionary: sae.TopK, tmp_path: Path
) -> None:
    files = {f"run/{path.name}": path.read_bytes() for path in saved.iterdir()}
    repository = hub.add("models", "org/repo", {**files, "big.bin": b"0" * 99999, "run/optimizer.pt": b"0" * 99999})
    metadata = json.loads(load(hub, tmp_path, "org/repo:run")[0])
    assert metadata.pop("hub") == {"repository": "org/repo", "commit": repository.commit, "path": "run"}
    assert metadata == dictionary.metadata
    loaded = torch.load(tmp_path / "loaded.pt")
    assert loaded.keys() == dictionary.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in dictionary.state_dict().items())
    assert sorted(hub.sent) == ["run/SHA256SUMS", "run/config.json", "run/weights.safetensors"], "no other file"
    hub.requests.clear()
    again = load(hub, tmp_path, "org/repo", f"org/repo@{repository.commit}:run/config.json")
    assert [json.loads(line)["hub"]["path"] for line in again] == ["run", "run"]
    assert got(hub) == [], "downloaded once"


def test_a_revision_is_pinned(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    commit = hub.add("models", "org/repo", files, revisions=("main", "v1")).commit
    lines = load(hub, tmp_path, "org/repo@v1", f"org/repo@{commit}", "org/repo@v2")
    assert [json.loads(line)["hub"]["commit"] for line in lines[:2]] == [commit, commit]
    assert lines[2] == (
        "FormatError dictionary 'org/repo@v2': the hub has 'org/repo', but not that revision: check what follows @"
    )
    assert all(f"/resolve/{commit}/" in line for line in got(hub)), "no file of a branch that may move"


def test_an_interrupted_download_continues_in_the_next_process(
    hub: LoopbackHub, saved: Path, dictionary: sae.TopK, tmp_path: Path
) -> None:
    hub.add("models", "org/repo", saved)
    first = PIECE + 2_000_000
    hub.faults = [
        Fault("drop", "weights.safetensors", after=first),
        Fault("drop", "weights.safetensors", times=-1, after=0),
    ]
    [line] = load(hub, tmp_path, "org/repo")
    assert line.startswith("FormatError dictionary 'org/repo': the hub at http://127.0.0.1:"), line
    assert "cannot be reached: check the network and run the same command again" in line
    hub.faults.clear()
    hub.requests.clear()
    hub.sent.clear()
    json.loads(load(hub, tmp_path, "org/repo")[0])
    [request] = got(hub, "weights.safetensors")
    start = int(re.search(r"bytes=(\d+)-", request)[1])  # type: ignore[index]
    assert start == PIECE
    size = (saved / "weights.safetensors").stat().st_size
    assert size > WEIGHTS
    assert hub.sent == {"weights.safetensors": size - start}, "the bytes that were missing, and no other"
    assert torch.equal(torch.load(tmp_path / "loaded.pt")["W_enc"], dictionary.W_enc)
    assert not list((tmp_path / "hf").rglob("*partial*"))


def test_a_connection_that_drops_once_is_taken_up(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    hub.add("models", "org/repo", saved)
    hub.faults = [Fault("drop", "weights.safetensors", after=PIECE + 2_000_000)]
    json.loads(load(hub, tmp_path, "org/repo")[0])
    size = (saved / "weights.safetensors").stat().st_size
    assert hub.sent["weights.safetensors"] == size + 2_000_000, (
        "only what the library had not written yet is sent twice"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_a_changed_byte_in_the_cache_is_refused(name: str, hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    hub.add("models", "org/repo", saved)
    load(hub, tmp_path, "org/repo")
    [path] = (tmp_path / "hf").rglob(f"snapshots/*/{name}")
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.resolve().chmod(0o600)
    path.resolve().write_bytes(content)
    for offline in ("0", "1"):
        [line] = load(hub, tmp_path, "org/repo", HF_HUB_OFFLINE=offline)
        assert line.startswith(
            f"DamagedError '{path}': damaged or changed: its hash is not {path.resolve().name[:12]}…"
        )
        assert line.endswith(f"delete '{path.resolve()}', and it is downloaded again")
    path.resolve().unlink()
    json.loads(load(hub, tmp_path, "org/repo")[0])


def test_a_byte_that_changes_on_the_way_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    """The hub's hash of a foreign file is the only one that there is."""
    case = CASES["saelens standard"]
    case.write(tmp_path / "theirs")
    repository = hub.add("models", "org/theirs", tmp_path / "theirs")
    weights = repository.files["sae_weights.safetensors"]
    hub.corrupt["sae_weights.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    [line] = load(hub, tmp_path, "org/theirs")
    assert line.startswith("DamagedError ")
    assert "sae_weights.safetensors': damaged or changed: its hash is not" in line


def test_offline_takes_the_cache_and_says_what_is_not_there(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    commit = hub.add("models", "org/repo", saved).commit
    load(hub, tmp_path, "org/repo")
    hub.requests.clear()
    lines = load(hub, tmp_path, "org/repo", f"org/repo@{commit}", "org/other", "org/repo:x", HF_HUB_OFFLINE="1")
    assert [json.loads(line)["hub"]["commit"] for line in lines[:2]] == [commit, commit]
    for line, name in zip(lines[2:], ("org/other", "org/repo:x"), strict=True):
        assert line.startswith(
            f"FormatError dictionary '{name}': neither a folder nor a file here, and not in the hub's"
        )
        assert line.endswith(": unset it to download, or give a dictionary's folder")
    assert hub.requests == []


def test_a_hub_out_of_reach(hub: LoopbackHub, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    [line] = load(hub, tmp_path, "org/repo", HF_ENDPOINT=url)
    assert line.startswith(f"FormatError dictionary 'org/repo': the hub at {url} cannot be reached: check the network")


def test_what_the_hub_does_not_give(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    hub.add("models", "org/private", saved, private=True)
    hub.add("models", "org/gated", saved, gated=True)
    hub.add("models", "org/text", {"README.md": b"# Nothing", "a/notes.txt": b""})
    hub.add(
        "models", "org/two", {f"{place}/{path.name}": path.read_bytes() for path in saved.iterdir() for place in "ab"}
    )
    names = ["org/nothing", "org/private", "org/gated", "org/text", "org/text:a", "org/two", "org/two:c"]
    lines = load(hub, tmp_path, *names, HF_TOKEN="")
    assert "the hub has no dictionary 'org/nothing' (or keeps it private: set HF_TOKEN)" in lines[0]
    assert "the hub has no dictionary 'org/private' (or keeps it private: set HF_TOKEN)" in lines[1]
    assert "access to 'org/gated' is restricted on the hub: ask for it on its page, then set HF_TOKEN" in lines[2]
    assert "the hub has 'org/text', but no dictionary at 'its top' (found: README.md, a/notes.txt)" in lines[3]
    assert "the hub has 'org/text', but no dictionary at 'a' (found: a/notes.txt, README.md)" in lines[4]
    assert lines[5].endswith("there are 2, give one of them: 'org/two:a', 'org/two:b'")
    assert "but no dictionary at 'c'" in lines[6]
    assert all(line.startswith("FormatError dictionary 'org/") for line in lines)
    again = load(hub, tmp_path, "org/private", "org/gated", HF_TOKEN="hf_token")
    assert [json.loads(line)["hub"]["repository"] for line in again] == ["org/private", "org/gated"]


REFUSED = """
import sys, sae
from sae.config.sources import ModelConfig
d = sae.load(sys.argv[1])
for processing in ("none", "center_and_fold"):
    model = sae.LanguageModel(ModelConfig(name=sys.argv[2], weight_processing=processing))
    try:
        with sae.splice(model, d):
            print("spliced")
    except sae.SaeError as error:
        print(type(error).__name__, error)
"""


def jb_files() -> dict[str, bytes]:
    """A dictionary of width 32 with the settings of gpt2-small-res-jb's files, which are of SAELens before 6."""
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(1)
    tensors = {"W_enc": (32, 8), "b_enc": (8,), "W_dec": (8, 32), "b_dec": (32,)}
    weights = save({name: torch.randn(shape, generator=generator) for name, shape in tensors.items()})
    settings = {"model_name": "gpt2-small", "hook_point": "blocks.1.hook_resid_pre", "d_in": 32, "d_sae": 8,
                "normalize_activations": "none", "context_size": 128}  # fmt: skip
    place = "blocks.1.hook_resid_pre"
    return {f"{place}/cfg.json": json.dumps(settings).encode(), f"{place}/sae_weights.safetensors": weights}


def test_a_release_refuses_a_model_whose_stream_is_not_centred(
    hub: LoopbackHub, tiny_model: Path, tmp_path: Path
) -> None:
    """The files of gpt2-small-res-jb do not say it; the table of releases does."""
    hub.add("models", JB, jb_files())
    done = process(hub, tmp_path, "-c", REFUSED, "gpt2-small-res-jb/1", str(tiny_model))
    assert done.returncode == 0, done.stderr
    refused, spliced = done.stdout.splitlines()
    assert refused.startswith("ModelError "), refused
    assert "weight_processing is 'none' there and 'center_and_fold' in training, on 'gpt2'" in refused
    assert str(tiny_model) in refused or "tiny" in refused
    assert spliced == "spliced"


SCALED = """
import json, sys, torch, sae
d = sae.load(sys.argv[1])
x = torch.linspace(-1, 1, 4 * 6).reshape(4, 6)
print(json.dumps(d(x).tolist()), d.metadata["converted"]["folded"])
"""


def test_the_scale_that_only_the_registry_has_is_folded(hub: LoopbackHub, tmp_path: Path) -> None:
    """SAELens: f = ReLU((c x − b_dec) W_enc + b_enc), x̂ = (f W_dec + b_dec) / c."""
    from safetensors.torch import save

    generator = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (6, 9), "b_enc": (9,), "W_dec": (9, 6), "b_dec": (6,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    settings = {"hook_point": "blocks.3.hook_mlp_out", "normalize_activations": "expected_average_only_in"}
    place = "sae_group_gpt2_blocks.3.hook_mlp_out_24576:v0"
    files = {f"{place}/cfg.json": json.dumps(settings).encode(), f"{place}/sae_weights.safetensors": save(tensors)}
    hub.add("models", "tommmcgrath/gpt2-small-mlp-out-saes", files)
    done = process(hub, tmp_path, "-c", SCALED, "gpt2-small-mlp-tm/3")
    assert done.returncode == 0, done.stderr
    W_enc, b_enc, W_dec, b_dec = (tensor.double() for tensor in tensors.values())
    c, x = 1.8958522157897557, torch.linspace(-1, 1, 4 * 6).reshape(4, 6).double()
    expected = (((c * x - b_dec) @ W_enc + b_enc).relu() @ W_dec + b_dec) / c
    values, _, folded = done.stdout.partition("]] ")
    torch.testing.assert_close(torch.tensor(json.loads(values + "]]")).double(), expected, rtol=1e-4, atol=1e-4)
    assert "an input scale of 1.89585" in folded


@pytest.mark.slow
def test_commands_take_names(hub: LoopbackHub, saved: Path, dictionary: sae.TopK, tmp_path: Path) -> None:
    commit = hub.add("models", "org/repo", saved).commit
    done = process(hub, tmp_path, "-m", "sae.cli.main", "info", "org/repo")
    assert done.returncode == 0, done.stderr
    assert "org/repo" in done.stdout and "64 → 32,768" in done.stdout and HOOK in done.stdout
    done = process(hub, tmp_path, "-m", "sae.cli.main", "convert", "org/repo", "theirs", "--to", "saelens")
    assert done.returncode == 0, done.stderr
    assert torch.equal(sae.load(tmp_path / "theirs").W_enc, dictionary.W_enc)
    done = process(hub, tmp_path, "-m", "sae.cli.main", "pull", "org/repo", "ours")
    assert (done.returncode, done.stderr) == (0, "")
    pulled = sae.load(tmp_path / "ours")
    assert pulled.metadata["hub"] == {"repository": "org/repo", "commit": commit, "path": ""}
    assert all(torch.equal(pulled.get_parameter(name), value) for name, value in dictionary.named_parameters())
    done = process(hub, tmp_path, "-m", "sae.cli.main", "pull", "org/repo", "ours")
    assert (done.returncode, done.stderr) == (1, "Error: 'ours': already there; give a new folder\n")


@pytest.mark.slow
def test_lists(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    """Folders' names, small files, and the commands' table; published numbers are marked as theirs."""
    cfg = json.dumps({"metadata": {"l0": 44.5}}).encode()
    scope = json.dumps({"l0": 60, "architecture": "jump_relu"}).encode()
    report = json.dumps({"l0": {"value": 8.0}, "fvu": {"value": 0.25}}).encode()
    ours = {f"ours/{path.name}": path.read_bytes() for path in saved.iterdir()}
    files = {**ours, "ours/eval.json": report, "theirs/cfg.json": cfg, "theirs/sae_weights.safetensors": b"",
             "resid_post/layer_1_width_16k_l0_big/params.safetensors": b"",
             "resid_post/layer_1_width_16k_l0_big/config.json": scope}  # fmt: skip
    hub.add("models", "org/many", files)
    hub.add(
        "models",
        "google/gemma-scope-2b-pt-res",
        {f"layer_{n}/width_16k/average_l0_7{n}/params.npz": b"" for n in (2, 10)},
    )
    code = "import sae, sys\nfor one in sae.list_dictionaries(sys.argv[1]).entries:\n    print(one)"
    done = process(hub, tmp_path, "-c", code, "org/many")
    assert done.stdout.splitlines() == [
        "Entry(id='ours', name='org/many:ours', numbers=Published(l0=8.0, "
        "variance_explained=0.75, source='eval.json'))",
        "Entry(id='resid_post/layer_1_width_16k_l0_big', name='org/many:resid_post/layer_1_width_16k_l0_big', "
        "numbers=Published(l0=60.0, variance_explained=None, source='config.json'))",
        "Entry(id='theirs', name='org/many:theirs', numbers=Published(l0=44.5, "
        "variance_explained=None, source='cfg.json'))",
    ], done.stderr
    assert not [path for path in hub.sent if path.endswith(("safetensors", "npz"))], "no weights"
    done = process(hub, tmp_path, "-m", "sae.cli.main", "list", "gemma-scope-2b-pt-res")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "average_l0" in line]
    assert "layer_2/width_16k/average_l0_72" in rows[0] and " 72 " in rows[0]
    assert "layer_10/width_16k/average_l0_710" in rows[1]
    assert "that is explained are theirs" in " ".join(done.stdout.split())
    done = process(hub, tmp_path, "-m", "sae.cli.main", "list")
    assert done.returncode == 0 and "gpt2-small-res-jb" in done.stdout
    done = process(hub, tmp_path, "-m", "sae.cli.main", "list", "nothing")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "Error: dictionary 'nothing': unknown; give a name of the hub, ORGANISATION/REPOSITORY"
    )


def test_from_pretrained(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    hub.add("models", "org/repo", saved)
    code = """
import sae, torch
d = sae.SparseAutoencoder.from_pretrained("org/repo", device="cpu", dtype=torch.float64)
print(type(d).__name__, d.dtype, sae.TopK.from_pretrained("org/repo").k)
try:
    sae.ReLU.from_pretrained("org/repo")
except sae.SaeError as error:
    print(error)
"""
    done = process(hub, tmp_path, "-c", code)
    assert done.stdout.splitlines() == [
        "TopK torch.float64 8",
        "dictionary 'org/repo': a TopK, not a ReLU; sae.SparseAutoencoder.from_pretrained loads every kind",
    ], done.stderr


def test_without_the_hub_s_library(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["huggingface_hub"] = None
import sae
try:
    sae.load("org/repo")
except sae.SaeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == ("dictionary 'org/repo': names of the hub need huggingface_hub: pip install 'sae[hub]'\n")
