from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.errors import CacheError, FormatError
from sae.files.reading import read_json
from sae.files.writing import write_bytes, write_json, write_tensors


def sums(folder: Path) -> list[str]:
    """Lines with a hash."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if re.search("[0-9a-f]{64}", line)]


def test_written_files_are_read_again(tmp_path: Path) -> None:
    write_bytes(tmp_path / "new" / "folder" / "a.bin", b"\x00\xff")
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"\x00\xff"
    write_json(tmp_path / "a.json", {"ü": [1.5, None]})
    assert read_json(tmp_path / "a.json") == {"ü": [1.5, None]}
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ü": [1.5, None]}
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3)})
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0, 1, 2]


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_tensors(tmp_path / name, {"y": torch.ones(2, 3), "x": torch.arange(5).half()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"disk full: '.*a.bin' needs 3 bytes or more; nothing is damaged: free some space"),
        (errno.EDQUOT, r"disk full: '.*a.bin' needs 3 bytes"),
        (errno.EIO, r"cannot write '.*a.bin': Input/output error; choose another folder"),
    ],
)
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int, message: str
) -> None:
    write_bytes(tmp_path / "a.bin", b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(CacheError, match=message):
        write_bytes(tmp_path / "a.bin", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SHA256SUMS", "a.bin"]
    assert len(sums(tmp_path)) == 1
    assert (tmp_path / "a.bin").read_bytes() == b"old"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux for the name of an open file")
def test_content_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        steps.append(
            f"sync {path.name if path.is_file() else 'folder'} {path.stat().st_size if path.is_file() else ''}"
        )
        fsync(descriptor)

    def watched_replace(self: Path, target: Path) -> Path:
        steps.append(f"rename to {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    write_bytes(tmp_path / "a.bin", b"12345")
    size = len((tmp_path / "SHA256SUMS").read_bytes())
    assert [re.sub(r"\d+-[0-9a-f]{8}", "N", step) for step in steps] == [
        "sync .a.bin.N.tmp 5", f"sync .SHA256SUMS.N.tmp {size}", "rename to SHA256SUMS", "rename to a.bin",
        "sync folder ",
    ]  # fmt: skip


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CacheError, match=r"cannot write '.*file/inner/a.json': (Not a directory|File exists)"):
        write_json(tmp_path / "file" / "inner" / "a.json", {})


def test_damaged_and_missing_json_is_named(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.json", b"{")
    with pytest.raises(FormatError, match=r"a.json': damaged \(Expecting.*\); delete it and run the command"):
        read_json(tmp_path / "a.json")
    with pytest.raises(FormatError, match=r"b.json': missing"):
        read_json(tmp_path / "b.json")
