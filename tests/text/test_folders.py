"""Folders of texts that hold more than texts: runs of the toolkit itself, links, pipes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import sae
from sae.activations.harvest import harvest
from sae.errors import DataError
from sae.model.language_model import LanguageModel
from sae.runs.verification import _OURS
from sae.text.census import Census
from sae.text.files import list_folder
from sae.text.fingerprint import source_fingerprint
from sae.text.own_files import own_names
from tests.conftest import TinyConfig, make_tiny_config


def names(folder: Path, census: Census | None = None, reading: int = 3) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_folder(folder, census, reading=reading)]


def test_a_run_inside_its_own_texts(
    tiny_model: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes no text: it can go on after a kill, be repeated, and be followed by another."""
    shutil.copytree(text_folder, tmp_path / "texts")
    monkeypatch.chdir(tmp_path / "texts")
    before, there = source_fingerprint("."), names(Path())
    overrides = {"features.tokens": 500, "evaluation.downstream_tokens": 128}
    config = make_tiny_config(tiny_model, Path(), Path("runs/x"), overrides)
    sae.run(config)
    census = Census()
    assert names(Path(), census) == there
    assert source_fingerprint(".") == before != source_fingerprint(".", reading=2)
    assert census.own > 10 and not census.other_kinds
    assert f"{census.own} files written by sae not read" in census.lines(".", chose_unit=True)[-1]
    shutil.rmtree("runs/x/activations/tokens")
    sae.run(config)
    (Path("runs/x") / "notes.md").write_text("What I think of it.")
    assert names(Path()) == [*there, "runs/x/notes.md"]
    for lists in Path("runs").rglob("SHA256SUMS"):
        lists.unlink()  # as older versions left it
    assert names(Path()) == [*there, "runs/x/notes.md"]


def test_a_cache_among_the_texts_that_a_kill_left(
    tiny_config: TinyConfig, language_model: LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text")
    harvest(tiny_config(), language_model)
    cache = tmp_path / "run" / "activations"
    for name in ("manifest.json", "SHA256SUMS"):
        (cache / name).unlink()
    assert names(tmp_path) == ["a.txt"]


def test_a_users_files_are_texts_whatever_they_are_called(tmp_path: Path) -> None:
    there = {"documents.json", "config.json", "eval.md", "README.md", "metrics.jsonl", "manifest.json", "config.yaml"}
    for name in there:
        (tmp_path / name).write_text("{}")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  README.md\n")
    for name in ("tokens", "dictionary"):
        (tmp_path / name).mkdir()
    assert own_names(tmp_path, ["tokens", "dictionary"], [*there, "SHA256SUMS"]) == set()
    assert set(names(tmp_path)) == there - {"config.yaml"}


def test_names_of_all_that_the_toolkit_writes_are_known(tmp_path: Path) -> None:
    """In folders that are older than the lists of hashes, too, but for what only other commands write."""
    for name in ("tokens/train-00000.safetensors", "dictionary/weights.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    others = {"state.pt", "sweep.json", "sweep.md", "superposition.json", "superposition.md"}
    assert own_names(tmp_path, ["tokens", "dictionary"], _OURS) == _OURS - others


def test_what_is_no_regular_file_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("text")
    for name in ("one", "two"):
        (folder / name).symlink_to(tmp_path / "elsewhere")
    (folder / "lost.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    with pytest.raises(
        DataError,
        match=r"file, only 2 links to folders, 1 link to nothing, 1 named pipe; .*; name a linked",
    ):
        list_folder(folder)
    (folder / "a.txt").write_text("text")
    census = Census()
    assert names(folder, census) == ["a.txt"]
    assert census.lines("x", chose_unit=True) == [
        "data source 'x': not read, being no regular files: 2 links to folders, 1 link to nothing, 1 named pipe"
    ]
