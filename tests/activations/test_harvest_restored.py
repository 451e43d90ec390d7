"""A harvest that lost files, ran out of disk or was killed ends with the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.errors import CacheError
from sae.files.writing import write_json
from sae.model.language_model import LanguageModel
from sae.runs.verification import verify
from sae.text.packing import packed_shards
from tests.support.harvest_case import HOOKS, Config, contents


@pytest.mark.parametrize(
    "lost",
    [
        [f"{HOOKS[0]}/train-00003.safetensors"],
        [f"{HOOKS[1]}/held_out-00001.safetensors", f"{HOOKS[0]}/train-00000.safetensors"],
        ["tokens/train-00001.safetensors"],
        ["documents.json"],
        ["tokens/held_out-00000.safetensors", f"{HOOKS[1]}/held_out-00000.safetensors"],
    ],
)
@pytest.mark.parametrize("truncated", [False, True])
def test_lost_files_are_restored_with_the_same_bytes(
    lost: list[str], truncated: bool, tiny_config: Config, tiny_cache: ActivationCache, language_model: LanguageModel,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = shutil.copytree(tiny_cache.path, tmp_path / "cache")
    before = contents(folder)
    for name in lost:
        if truncated:
            (folder / name).write_bytes(before[name][:-7])
        else:
            (folder / name).unlink()
    cache = harvest(tiny_config(harvest__cache=str(folder), harvest__hooks=HOOKS), language_model)
    assert contents(cache.path) == before


def test_text_is_restored_in_the_order_that_the_manifest_is_of(
    tiny_config: Config, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest without a version is of documents that `random.Random(0)` shuffled."""
    config = tiny_config(data__shuffle_documents=5)
    with monkeypatch.context() as patch:
        patch.setattr("sae.activations.token_shards.packed_shards", lambda *given: packed_shards(*given[:4], streams=1))
        folder = harvest(config, language_model).path
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"].pop("streams") == 2
    lost = ("tokens/train-00001.safetensors", "documents.json")
    for name in lost:
        (folder / name).unlink()
    with pytest.raises(CacheError, match=r"differs from its checksum \(the text has changed, or this version reads it"):
        harvest(config, language_model)
    write_json(folder / "manifest.json", manifest)
    harvest(config, language_model)
    held = contents(folder)
    assert all(hashlib.sha256(held[name]).hexdigest() == manifest["files"][name]["sha256"] for name in lost)


@pytest.mark.parametrize("reading", [1, 2, 3, 4])
def test_text_is_restored_as_the_version_read_it_that_the_manifest_is_of(
    reading: int, tiny_config: Config, text_folder: Path, language_model: LanguageModel, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Version 1 took byte order marks for text and texts with another end for other texts."""
    source = shutil.copytree(text_folder, tmp_path / "text")
    for file in sorted(source.rglob("*.txt"))[:20]:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        file.with_suffix(".md").write_bytes(file.read_bytes() + b"\n")
    config = tiny_config(data__source=str(source))
    with monkeypatch.context() as patch:
        patch.setattr("sae.activations.harvest.READING", reading)
        folder = harvest(config, language_model).path
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["data"]["duplicates"] > 10) == (reading >= 2)
    if reading == 1:
        del manifest["data"]["reading"]
        write_json(folder / "manifest.json", manifest)
    before = contents(folder)
    for name in ("tokens/train-00001.safetensors", "documents.json"):
        (folder / name).unlink()
    harvest(config, language_model)
    assert contents(folder) == before
    (folder / "documents.json").unlink()
    manifest["data"]["reading"] = 5
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(
        CacheError, match=r"its manifest has reading=5, but this version knows 0 to 4: restore it with the"
    ):
        harvest(config, language_model)


def test_restoring_what_has_changed_is_refused_and_touches_nothing(
    tiny_config: Config, tiny_cache: ActivationCache, language_model: LanguageModel, tmp_path: Path, monkeypatch
) -> None:
    folder = shutil.copytree(tiny_cache.path, tmp_path / "cache")
    config = tiny_config(harvest__cache=str(folder), harvest__hooks=HOOKS)
    shard = f"{HOOKS[0]}/train-00003.safetensors"
    (folder / shard).unlink()
    before = contents(folder)
    original = language_model.activations
    with monkeypatch.context() as patch:
        patch.setattr(
            language_model, "activations", lambda t, hooks: {h: x + 1e-3 for h, x in original(t, hooks).items()}
        )
        with pytest.raises(CacheError, match=rf"{shard} was made again and differs from its checksum \(other hardware"):
            harvest(config, language_model)
    assert contents(folder) == before
    harvest(config, language_model)
    (folder / "tokens/train-00003.safetensors").unlink()
    monkeypatch.setattr("sae.text.prepared.is_held_out", lambda name, seed, fraction: name > "030")
    with pytest.raises(CacheError, match=r"differs from its checksum \(the text has changed, or this version reads it"):
        harvest(config, language_model)


@pytest.mark.parametrize("writes", [0, 3, 11, 14, 20])
def test_disk_full_then_resumed_gives_the_same_bytes(
    writes: int, tiny_config: Config, tiny_cache: ActivationCache, language_model: LanguageModel, monkeypatch
) -> None:
    """The disk is full from the given number of syncs on; then there is space again."""
    done = [0]
    fsync = os.fsync

    def full(descriptor: int) -> None:
        done[0] += 1
        if done[0] > 2 * writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    config = tiny_config(harvest__hooks=HOOKS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            CacheError, match=r"disk full: '.*' needs [\d,]+ bytes or more; nothing is damaged: free some space"
        ):
            harvest(config, language_model)
    assert not [name for name in contents(config.cache_folder) if name.endswith(".tmp")]
    assert contents(harvest(config, language_model).path) == contents(tiny_cache.path)


def test_a_harvest_that_cannot_fit_is_not_begun(
    tiny_config: Config, tiny_cache: ActivationCache, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,200 rows of two hooks of 32 float32, 307,200 bytes, and of two int32, 9,600."""
    Usage = namedtuple("Usage", "total used free")
    config = tiny_config(harvest__hooks=HOOKS)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 316_799))
        with pytest.raises(
            CacheError, match=r"disk full: .*/activations' needs 0.00 GB more, 0.00 GB are free: .*int8"
        ):
            harvest(config, language_model)
        assert not list(config.cache_folder.glob("blocks.*/*"))
        patch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 316_800))
        cache = harvest(config, language_model)
    assert contents(cache.path) == contents(tiny_cache.path)


@pytest.mark.slow
def test_killed_harvests_end_with_the_same_bytes(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, and at steps of the file system, then resumed to the end."""
    script = Path(__file__).parents[1] / "support" / "killed_harvest.py"
    command = [sys.executable, str(script), str(tiny_model), str(text_folder), str(tmp_path), "10"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=one_thread)
    assert answer.returncode == 0, answer.stderr[-2000:]
    report = json.loads(answer.stdout.splitlines()[-1])
    where = [state for _, killed, state in report["states"] if killed]
    assert where.count("text") >= 3, report
    assert where.count("activations") >= 8, report
    runs = sorted(path for path in tmp_path.iterdir() if path.name != "whole")
    assert len(runs) >= 15
    whole = contents(tmp_path / "whole")
    assert len(whole) == 2 * 10 + 10 + 4  # two hooks and tokens in 8 + 2 shards; documents, manifest, its hash, lock
    for run in runs:
        assert contents(run) == whole, run.name
    assert verify(tmp_path / "whole") == (32, [])
