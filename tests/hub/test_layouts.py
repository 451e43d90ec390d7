"""Which files of a repository are a dictionary: those that the formats read, and no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import sae
from sae.hub.layouts import Found, dictionaries_in, find
from tests.support.foreign_files import CASES, Case


def paths_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_files_that_are_found_suffice(case: Case, tmp_path: Path) -> None:
    """Every format's, next to files that a repository also has."""
    place = case.write(tmp_path / "repository" / "inner")
    whole = sae.load(place)
    (tmp_path / "repository" / "README.md").write_text("# Dictionaries")
    (place if place.is_dir() else place.parent).joinpath("optimizer.pt").write_bytes(b"large")
    asked = place.relative_to(tmp_path / "repository").as_posix()
    [found] = find(paths_in(tmp_path / "repository"), asked)
    for file in found.files:
        (tmp_path / "copy" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "repository" / file, tmp_path / "copy" / file)
    assert not [file for file in found.files if "optimizer" in file or "README" in file]
    copied = sae.load(tmp_path / "copy" / found.place)
    assert torch.equal(copied.W_dec, whole.W_dec)
    assert copied.metadata == whole.metadata


def test_ours_counts_where_saelens_s_files_are_too() -> None:
    ours, theirs = ("config.json", "weights.safetensors"), ("cfg.json", "sae_weights.safetensors")
    files = [f"a/{name}" for name in (*theirs, *ours, "SHA256SUMS")] + [f"b/{name}" for name in theirs]
    found = dictionaries_in(files)
    assert found == {
        "a": Found("a", ("a/SHA256SUMS", "a/config.json", "a/weights.safetensors")),
        "b": Found("b", ("b/cfg.json", "b/sae_weights.safetensors")),
    }


def test_a_path_of_several_gives_all_of_them_in_order() -> None:
    files = [f"x/layer_{number}/params.npz" for number in (10, 9)] + ["y/params.npz"]
    assert [one.place for one in find(files, "x")] == ["x/layer_9", "x/layer_10"]
    assert [one.place for one in find(files, "")] == ["x/layer_9", "x/layer_10", "y"]
    assert [one.place for one in find(files, "x/layer_9/params.npz")] == ["x/layer_9"]
    assert find(files, "z") == []


def test_what_belongs_to_training_is_no_dictionary() -> None:
    files = ["trainer_0/ae.pt", "trainer_0/config.json", "trainer_0/checkpoints/ae_100.pt", "100.pt", "state.pt"]
    assert list(dictionaries_in(files)) == ["trainer_0"]
    assert find(files, "state.pt") == [Found("state.pt", ("state.pt",))]
