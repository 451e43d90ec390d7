"""Uploads of dictionaries to a hub on this machine: files, page, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from support.loopback_hub import LoopbackHub, loopback_hub

import sae
from sae.dictionary.frame import Frame
from sae.runs.run import Run
from tests.conftest import make_tiny_config

HOOK = "blocks.1.hook_resid_pre"
OURS = ["SHA256SUMS", "cfg.json", "config.json", "sae_weights.safetensors", "weights.safetensors"]


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as server:
        yield server


@pytest.fixture(scope="module")
def run(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: dictionary, report with figures, feature store. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    overrides = {"train.tokens": 4000, "data.held_out_tokens": 1600, "data.tokens": 2000, "dictionary.d_sae": 512,
                 "evaluation.frozen_decoder_tokens": 0}  # fmt: skip
    finished = Run(make_tiny_config(tiny_model, text_folder, folder, overrides))
    finished.harvest()
    finished.train()
    finished.evaluate()
    finished.features()
    return folder


def process(hub: LoopbackHub, home: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process for which `hub` is the hub, with a token unless it is empty."""
    settings = {**os.environ, **hub.environment(home / "hf"), "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_secret"}
    settings = {name: value for name, value in (settings | environment).items() if value}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=180, check=False, cwd=home, env=settings
    )  # fmt: skip


def command(hub: LoopbackHub, home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return process(hub, home, "-m", "sae.cli.main", *words, **environment)


def test_pushed_pulled_and_loaded_is_the_same_to_the_last_bit(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    done = command(hub, tmp_path, "push", str(run), "org/repo", "--licence", "mit", "--private")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["models", "org/repo"]
    assert repository.private
    place = f"{HOOK}/"
    names = sorted(path.removeprefix(place) for path in repository.files if path.startswith(place))
    assert names == sorted([*OURS, "README.md", "density.png", "eval.json"])
    assert "README.md" in repository.files
    assert done.stdout.startswith(f"org/repo:{HOOK}\n  page {hub.url}/org/repo\n  commit {repository.commit[:12]}\n")
    done = command(hub, tmp_path, "pull", f"org/repo:{HOOK}", "pulled")
    assert done.returncode == 0, done.stderr
    pulled, original = sae.load(tmp_path / "pulled"), sae.load(run)
    assert type(pulled) is type(original)
    for name, parameter in original.named_parameters():
        assert torch.equal(pulled.get_parameter(name), parameter)
    source = {"repository": "org/repo", "commit": repository.commit, "path": HOOK}
    assert pulled.metadata == {**original.metadata, "hub": source}
    assert (tmp_path / "pulled" / "weights.safetensors").read_bytes() == repository.files[f"{HOOK}/weights.safetensors"]
    done = process(hub, tmp_path, "-c", "import sae; print(sae.load('org/repo').metadata['hub']['path'])")
    assert done.stdout.strip() == HOOK, done.stderr
    done = command(hub, tmp_path, "pull", "org/repo", HF_TOKEN="", HF_HOME=str(tmp_path / "other"))
    assert (
        done.returncode == 1
        and "the hub has no dictionary 'org/repo' (or keeps it private: set HF_TOKEN)" in done.stderr
    )


def test_saelens_s_files_hold_the_same(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    command(hub, tmp_path, "push", str(run), "org/repo:there")
    files = hub.repositories["models", "org/repo"].files
    (tmp_path / "theirs").mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "theirs" / name).write_bytes(files[f"there/{name}"])
    theirs, original = sae.load(tmp_path / "theirs"), sae.load(run)
    x = torch.randn(20, original.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(x), original(x))
    settings = json.loads(files["there/cfg.json"])
    assert (settings["architecture"], settings["metadata"]["hook_name"]) == ("topk", HOOK)


def test_the_page(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    """Its header is what the hub reads; its numbers are those of the report and of the store."""
    command(hub, tmp_path, "push", str(run), "org/repo", "--licence", "cc-by-4.0")
    files = hub.repositories["models", "org/repo"].files
    top, inner = (files[name].decode() for name in ("README.md", f"{HOOK}/README.md"))
    _, header, text = top.split("---\n", 2)
    stated = yaml.safe_load(header)
    assert stated["library_name"] == "sae"
    assert stated["license"] == "cc-by-4.0"
    assert "saelens" in stated["tags"]
    assert "base_model" not in stated and "datasets" not in stated, "the model and the text are folders here"
    record = json.loads((run / "eval.json").read_text())
    [row] = [line for line in text.splitlines() if line.startswith("| `fvu`")]
    shown = re.search(r"([\d.]+) ± ([\d.]+)", row)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(record["fvu"]["value"], rel=0.01)
    assert float(shown[2]) == pytest.approx(record["fvu"]["standard_error"], rel=0.1)
    assert f'sae.load("org/repo:{HOOK}")' in text
    assert f'SAE.from_pretrained("org/repo", "{HOOK}")' in text
    assert f"]({HOOK}/density.png)" in top and "](density.png)" in inner
    assert "cc-by-4.0" in text.split("## Licence")[1]
    features = sae.Features(run)
    rows = [
        re.split(r"(?<!\\)\|", line) for line in text.split("## Features")[1].splitlines() if re.match(r"\| \d", line)
    ]
    assert 0 < len(rows) <= 10
    for cells in rows:
        feature = features[int(cells[1])]
        assert cells[2].strip() == f"{feature.density:.3%}"
        token = feature.top[0].tokens[feature.top[0].position].strip()
        assert token.replace("\\", "") in cells[4].replace("\\", "")


@pytest.mark.slow
def test_a_second_dictionary_makes_the_top_page_a_list(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    command(hub, tmp_path, "push", str(run), "org/repo:a")
    done = command(hub, tmp_path, "push", str(run / "dictionary"), "org/repo:b")
    assert done.returncode == 0, done.stderr
    files = hub.repositories["models", "org/repo"].files
    page = files["README.md"].decode()
    assert "[a](a)" in page and "[b](b)" in page and "`org/repo:b`" in page
    assert "| `fvu`" in files["a/README.md"].decode()
    assert "| `fvu`" in files["b/README.md"].decode(), "the dictionary's folder is in its run folder"
    assert "replaces" not in done.stdout
    done = command(hub, tmp_path, "push", str(run / "dictionary"), "org/repo:a")
    assert "replaces the dictionary that was there, which commit" in " ".join(done.stdout.split())
    done = process(hub, tmp_path, "-c", "import sae; sae.load('org/repo')")
    assert "there are 2, give one of them: 'org/repo:a', 'org/repo:b'" in done.stderr


def test_a_page_of_somebody_s_own_stays(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    hub.add("models", "org/repo", {"README.md": b"# Mine"})
    done = command(hub, tmp_path, "push", str(run), "org/repo")
    assert "the repository's README.md was not written by sae, and stays as it is" in " ".join(done.stdout.split())
    files = hub.repositories["models", "org/repo"].files
    assert files["README.md"] == b"# Mine"
    assert b"## Evaluation" in files[f"{HOOK}/README.md"]


def test_a_dictionary_pushes_itself(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    code = f"import sae\nprint(sae.load({str(run)!r}).push_to_hub('org/repo', licence='mit').files)"
    done = process(hub, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    names = sorted(f"{HOOK}/{name}" for name in [*OURS, "README.md"])
    assert eval(done.stdout) == ("README.md", *names)


def test_what_saelens_has_not_goes_in_ours_alone(hub: LoopbackHub, tmp_path: Path) -> None:
    """A TopK transcoder to another width, with a skip connection, of which its page says so."""
    metadata = {
        "hook": "blocks.1.mlp.hook_in",
        "target_hook": "blocks.1.hook_mlp_out",
        "data": {"source": "/home/me/texts"},
    }
    dictionary = sae.TopK(8, 16, k=2, metadata=metadata)
    dictionary.set_frame(Frame(skip=True, d_out=6))
    torch.nn.init.eye_(dictionary.W_dec)
    dictionary.save(tmp_path / "transcoder")
    done = command(hub, tmp_path, "push", "transcoder", "org/repo")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "without files for SAELens: SAELens has no topk transcoder: only ReLU and JumpReLU" in words
    assert "no licence is stated" in words
    assert "the files name places on this machine: '/home/me/texts'" in words
    files = hub.repositories["models", "org/repo"].files
    place = "blocks.1.mlp.hook_in-to-blocks.1.hook_mlp_out"
    page = files["README.md"].decode()
    assert "# Transcoder" in page
    for fact in ("topk, k=2, skip=True, d_out=6", "8 → 16 → 6", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"):
        assert f"`{fact}`" in page, fact
    names = ("README.md", "SHA256SUMS", "config.json", "weights.safetensors")
    assert sorted(files) == sorted(["README.md", *(f"{place}/{name}" for name in names)])
    assert "saelens" not in files["README.md"].decode().lower()


def test_a_report_of_other_weights_is_left_out(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run, tmp_path / "own")
    dictionary = sae.load(tmp_path / "own")
    dictionary.W_enc.mul_(1.5)
    dictionary.save(tmp_path / "own" / "dictionary")
    done = command(hub, tmp_path, "push", "own", "org/repo")
    words = " ".join(done.stdout.split())
    assert "without eval.json, which is of other weights: 'sae eval' makes it anew" in words
    assert "without features: the feature store is of other weights" in words
    assert "## Evaluation" not in hub.repositories["models", "org/repo"].files["README.md"].decode()


@pytest.mark.slow
def test_what_is_refused(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    hub.add("models", "org/public", {})
    cases = {
        ("org/public", "--private"): "'org/public': a public repository already; make it private on its page, or leave",
        ("repository",): "'repository': expected ORGANISATION/REPOSITORY, with :PATH if wanted",
        ("gpt2-small-res-jb/8",): "'gpt2-small-res-jb/8': expected ORGANISATION/REPOSITORY",
    }
    for words, reason in cases.items():
        done = command(hub, tmp_path, "push", str(run), *words)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.startswith(f"Error: {reason}"), done.stderr
    assert hub.repositories["models", "org/public"].files == {}
    done = command(hub, tmp_path, "push", str(run), "org/new", HF_TOKEN="")
    assert "the hub does not let you write to 'org/new'" in done.stderr and "hf auth login" in done.stderr
    done = command(hub, tmp_path, "push", str(run), "org/new", HF_HUB_OFFLINE="1")
    assert done.stderr == (
        f"Error: upload to 'org/new:{HOOK}': the hub's offline mode is on (HF_HUB_OFFLINE): unset it to upload\n"
    )
    assert ("models", "org/new") not in hub.repositories


@pytest.mark.slow
def test_a_model_that_is_another_one_is_refused(hub: LoopbackHub, run: Path, text_folder: Path, tmp_path: Path) -> None:
    """By the hash of its weights, which travels with the dictionary; both models are named."""
    from tests.conftest import write_tiny_model

    command(hub, tmp_path, "push", str(run), "org/repo")
    other = write_tiny_model(tmp_path / "another", text_folder, seed=1)
    code = """
import sae, sys
try:
    with sae.splice(sae.LanguageModel(sys.argv[1]), sae.load("org/repo")):
        print("spliced")
except sae.SaeError as error:
    print(error)
"""
    done = process(hub, tmp_path, "-c", code, str(other))
    name = sae.load(run).origin.models[""]["name"]
    assert done.stdout.startswith("model 'another': not the dictionary's model: weights_sha256 is"), done.stderr
    assert done.stdout.rstrip().endswith(f"in training, on {name!r}; use the model it was trained on")


@pytest.mark.slow
def test_compare_takes_names(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    command(hub, tmp_path, "push", str(run), "org/repo")
    done = command(hub, tmp_path, "--quiet", "compare", str(run), "org/repo", "--out", "compared")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert list(record["dictionaries"])[1] == "org/repo"


@pytest.mark.slow
def test_the_guide_s_lines_run(hub: LoopbackHub, run: Path, tmp_path: Path) -> None:
    """In a shell and in Python, in their order, with a repository of the release's name."""
    from tests.hub.test_hub_downloads import JB, jb_files
    from tests.test_snippets import commands, snippets

    hub.add("models", JB, {path.replace("blocks.1", "blocks.8"): data for path, data in jb_files().items()})
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(run)
    lines = 0
    for language, text in snippets("docs/guides/hub.md"):
        for line in commands(text) if language == "sh" else []:
            done = command(hub, tmp_path, *line.split()[1:])
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            lines += 1
        if language == "python":
            done = process(hub, tmp_path, "-c", text if text.startswith("import sae") else f"import sae\n{text}")
            assert done.returncode == 0, f"{text}\n{done.stderr}"
            lines += 1
    assert lines == 9
    assert hub.repositories["models", "me/secret"].private
