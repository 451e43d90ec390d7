"""Uploads to a repository that has files already, and downloads that are run again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.loopback_hub import loopback_hub

import sae
from sae.errors import ConfigError, FormatError
from sae.hub import HubName
from sae.runs import publishing
from sae.runs.card import MARK, Content


class Api:
    """The hub's library, with one repository in a folder, which is at one commit."""

    endpoint, sha, oid = "hub", "a" * 40, "b" * 40

    def __init__(self, folder: Path) -> None:
        self.folder, self.parents = folder, list[str | None]()
        folder.mkdir()

    def put(self, path: str, content: bytes) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(content)

    def model_info(self, repository: str, revision: str) -> Api:
        assert revision == "main"
        return self

    def list_repo_files(self, repository: str, revision: str) -> list[str]:
        assert revision == self.sha, "the files of the commit that is the parent"
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def hf_hub_download(self, repository: str, path: str, revision: str) -> str:
        assert revision == self.sha
        return str(self.folder / path)

    def create_commit(self, repository: str, operations: list[Any], *, parent_commit: str | None, **_: Any) -> Api:
        self.parents.append(parent_commit)
        for operation in operations:
            source = getattr(operation, "path_or_fileobj", None)
            if source is None:
                (self.folder / operation.path_in_repo).unlink()
            else:
                self.put(operation.path_in_repo, source if isinstance(source, bytes) else Path(source).read_bytes())
        return self


def upload(api: Api, path: str, source: Path, *more: str) -> list[str]:
    """Upload a dictionary, with more files next to its own; the notes."""
    dictionary = sae.TopK(4, 8, k=2)
    torch.nn.init.eye_(dictionary.W_dec)
    dictionary.save(source)
    for name in more:
        (source / name).write_text("x")
    place, notes = HubName("org/repo", path), list[str]()
    publishing._upload(api, place, source, Content(dictionary, place, None, None, None, None, False, []), notes)
    return notes


@pytest.mark.parametrize("path", ["", "a/b"])
def test_a_second_push_leaves_nothing_of_the_first(path: str, tmp_path: Path) -> None:
    api = Api(tmp_path / "hub")
    optional = ("cfg.json", "sae_weights.safetensors", "eval.json", "density.png", "SHA256SUMS")
    api.put("notes/eval.json", b"of another")
    assert upload(api, path, tmp_path / "first", *optional) == []
    api.put(f"{path}/notes.txt".strip("/"), b"mine")
    assert all((api.folder / path / name).exists() for name in optional)
    replaced, note = upload(api, path, tmp_path / "second", "SHA256SUMS")
    assert replaced == f"replaces the dictionary that was there, which commit {Api.sha[:12]} still has"
    left = sorted(file.name for file in (api.folder / path).iterdir() if file.is_file())
    assert left == ["README.md", "SHA256SUMS", "config.json", "notes.txt", "weights.safetensors"]
    assert (api.folder / "notes" / "eval.json").read_bytes() == b"of another"
    prefix = f"{path}/" if path else ""
    assert note.endswith(": " + ", ".join(sorted(f"{prefix}{name}" for name in optional if name != "SHA256SUMS")))
    assert api.parents == [Api.sha, Api.sha]


def test_files_that_push_did_not_write_stay(tmp_path: Path) -> None:
    api = Api(tmp_path / "hub")
    api.put("a/cfg.json", b"SAELens's")
    api.put("a/sae_weights.safetensors", b"SAELens's")
    assert upload(api, "a", tmp_path / "first") == []
    assert (api.folder / "a" / "cfg.json").read_bytes() == b"SAELens's"


@pytest.mark.parametrize(("path", "page"), [("", "README.md"), ("a", "README.md"), ("a", "a/README.md")])
def test_no_page_of_somebody_s_own_is_overwritten(path: str, page: str, tmp_path: Path) -> None:
    api = Api(tmp_path / "hub")
    api.put(page, b"# Mine")
    [note] = upload(api, path, tmp_path / "first")
    assert (api.folder / page).read_bytes() == b"# Mine"
    assert note.endswith(f"{page} was not written by sae, and stays as it is")
    others = {"README.md", f"{path}/README.md".strip("/")} - {page}
    assert all(MARK in (api.folder / other).read_text() for other in others)


def test_a_dictionary_at_the_top_of_several_is_listed(tmp_path: Path) -> None:
    """SAELens's files, which others have uploaded, are not counted."""
    api = Api(tmp_path / "hub")
    api.put("theirs/cfg.json", b"{}")
    api.put("theirs/sae_weights.safetensors", b"")
    upload(api, "a", tmp_path / "first")
    assert "## Use" in (api.folder / "README.md").read_text(), "the page of the only one"
    upload(api, "", tmp_path / "second")
    page = (api.folder / "README.md").read_text()
    assert "[org/repo](.)" in page and "[a](a)" in page and "`org/repo:a`" in page
    assert "theirs" not in page and "## Use" not in page


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "on this machine: [Errno 28] No space left on device"),
        (412, "another upload to 'org/repo' came first (412): run the same command again"),
    ],
)
def test_reasons_of_failed_uploads(error: Exception | int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if isinstance(error, int):
        answer, error = type("Answer", (), {"status_code": error}), ValueError("Precondition Failed")
        error.response = answer  # type: ignore[attr-defined]
    with pytest.raises(FormatError) as caught, publishing._hub_errors(HubName("org/repo")):
        raise error
    assert str(caught.value) == f"upload to 'org/repo': {words}"


def test_a_killed_pull_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "models--org--repo" / "snapshots" / ("0" * 40)
    dictionary = sae.TopK(4, 8, k=2)
    torch.nn.init.eye_(dictionary.W_dec)
    dictionary.save(place)
    monkeypatch.setattr(publishing, "located", lambda name: place)
    save = sae.TopK.save

    def killed(self: sae.TopK, folder: str | Path) -> None:
        save(self, folder)
        (Path(folder) / "config.json").unlink()
        raise KeyboardInterrupt

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "pulled", tmp_path / "empty"):
        monkeypatch.setattr(sae.TopK, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            publishing.pull("org/repo", folder)
        monkeypatch.setattr(sae.TopK, "save", save)
        assert publishing.pull("org/repo", folder) == folder
        loaded = sae.load(folder)
        assert torch.equal(loaded.get_parameter("W_enc"), dictionary.W_enc)
        assert not list(folder.parent.glob(".*"))
        with pytest.raises(ConfigError, match="already there"):
            publishing.pull("org/repo", folder)


TWICE = """
import sys, torch, sae
transcoder = {"hook": "blocks.1.mlp.hook_in", "target_hook": "blocks.1.hook_mlp_out"}
for hooks in ({"hook": "blocks.0.hook_resid_pre"}, transcoder):
    d = sae.TopK(8, 16, k=2, metadata=hooks)
    torch.nn.init.eye_(d.W_dec)
    print(*d.push_to_hub("org/repo:a", licence="mit").files)
"""


def test_the_hub_s_library_deletes_and_adds_in_one_commit(tmp_path: Path) -> None:
    """A TopK dictionary, and then a TopK transcoder, which SAELens has not."""
    with loopback_hub() as hub:
        settings = {**os.environ, **hub.environment(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HF_TOKEN": "hf_secret"}
        done = subprocess.run(
            [sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
            env=settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "a/cfg.json" in done.stdout.splitlines()[0]
        ours = ["README.md", "a/README.md", "a/SHA256SUMS", "a/config.json", "a/weights.safetensors"]
        assert sorted(hub.repositories["models", "org/repo"].files) == ours
        commits = [line for line in hub.requests if line.startswith("POST") and "/commit/" in line]
        assert len(commits) == 2
