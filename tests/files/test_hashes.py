from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sae
from sae.architectures import TopK
from sae.config.environment import choose_device
from sae.errors import ConfigError, DamagedError, UnreadableError
from sae.files import digest, reading, temporary
from sae.files.damage import SUMS
from sae.files.hashes import UnhashedWarning, check, read_checked
from sae.files.reading import read_json
from sae.files.sums import recorded, settle
from sae.files.writing import locked, write_bytes, write_json
from sae.runs.verification import record_hashes, verify


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_list_is_one_that_sha256sum_checks(tmp_path: Path) -> None:
    for name, content in (("b.json", b"{}"), ("a.bin", b"abc"), ("b.json", b"[1]")):
        write_bytes(tmp_path / name, content)
    lines = (tmp_path / SUMS).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#")
    assert lines[1:] == [f"{sha(b'abc')}  a.bin", f"{sha(b'[1]')}  b.json"]
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["a.bin: OK", "b.json: OK"]


@pytest.mark.parametrize("size", [0, 1, 4_194_303, 4_194_304, 9_000_001])
def test_hashes_are_those_of_hashlib(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a.bin").write_bytes(content)
    assert digest.sha256_of(tmp_path / "a.bin") == sha(content)
    with (tmp_path / "a.bin").open("rb") as file:
        assert digest._hash_read(file.fileno()) == sha(content)


def test_a_changed_file_is_named_with_what_was_expected(tmp_path: Path) -> None:
    write_bytes(tmp_path / "eval.json", b"{}")
    (tmp_path / "eval.json").write_bytes(b"{ }")
    message = (
        f"'{tmp_path / 'eval.json'}': damaged or changed: its SHA-256 is {sha(b'{ }')[:12]}… and should be "
        f"{sha(b'{}')[:12]}…; delete it and run the same 'sae run' or 'sae eval' again"
    )
    for read in (check, read_json, lambda path: read_checked(path, most=100)):
        with pytest.raises(DamagedError) as caught:
            read(tmp_path / "eval.json")
        assert str(caught.value) == message
    [problem] = verify(tmp_path)[1]
    assert problem == message


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"abc")
    os.utime(path, ns=(0, 0))
    monkeypatch.setattr(digest, "_YOUNG_NS", -1)
    check(path)
    monkeypatch.setattr(digest, "_hash_mapped", lambda *_: pytest.fail("read again"))
    check(path)
    monkeypatch.undo()
    state = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(DamagedError):
        check(path)


def replace_killed_at(path: Path, step: int) -> bool:
    """A child that replaces the file and is killed at a step of the file system; whether there was one."""
    child = os.fork()
    if child == 0:
        done = [0]
        fsync, replace = os.fsync, Path.replace

        def act() -> None:
            done[0] += 1
            if done[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = lambda descriptor: (act(), fsync(descriptor))[1]
        Path.replace = lambda self, target: (act(), replace(self, target), act())[1]
        write_bytes(path, b"new")
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_any_step_the_file_and_the_list_agree(tmp_path: Path) -> None:
    seen, steps = set(), 0
    for step in range(1, 100):
        path = tmp_path / str(step) / "a.json"
        write_bytes(path, b"old")
        if not replace_killed_at(path, step):
            break
        steps += 1
        content = read_checked(path, most=10)
        seen.add(content)
        assert content in (b"old", b"new")
        assert verify(path.parent) == (1, [])
        with locked(path.parent, "writing"):
            pass
        assert recorded(path) == (sha(content),), "the lock puts the list in order"
        assert sorted(name.name for name in path.parent.iterdir()) == [".lock", SUMS, "a.json"]
        write_bytes(path, b"new")
        assert recorded(path) == (sha(b"new"),)
    assert seen == {b"old", b"new"}
    assert steps >= 8


def test_two_writers_forced_into_each_other_leave_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one writes all of its file between the first one's content and its name."""
    path = tmp_path / "eval.json"
    entered, fsync = threading.Event(), os.fsync
    threads: list[threading.Thread] = []

    def interleaved(descriptor: int) -> None:
        if not entered.is_set():
            entered.set()
            threads.append(threading.Thread(target=write_json, args=(path, {"second": 2})))
            threads[0].start()
            threads[0].join(20)
            assert json.loads(path.read_bytes()) == {"second": 2}
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interleaved)
    write_json(path, {"first": 1})
    assert read_json(path) == {"first": 1}
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_a_living_process_writes_is_not_cleared(tmp_path: Path) -> None:
    with temporary.temporary_file(tmp_path / "a") as (living, _):
        (tmp_path / ".b.1-00000000.tmp").write_bytes(b"half")
        temporary.clear_temporaries(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [living.name]


@pytest.mark.parametrize("kind", ["FIFO", "folder", "link"])
def test_what_is_no_file_is_named_at_once(tmp_path: Path, kind: str) -> None:
    dictionary = TopK(4, 8, k=2)
    dictionary.save(tmp_path / "d")
    for name in ("config.json", "weights.safetensors", SUMS):
        path = tmp_path / "d" / name
        content = path.read_bytes()
        path.unlink()
        make: dict[str, Callable[[], None]] = {
            "FIFO": lambda path=path: os.mkfifo(path),
            "folder": path.mkdir,
            "link": lambda path=path: path.symlink_to(path.name),
        }
        make[kind]()
        reason = {"FIFO": "a FIFO where a file", "folder": "a folder where", "link": "Too many levels of symbolic"}
        with pytest.raises(DamagedError, match=f"{name}': .*{reason[kind]}"):
            sae.load(tmp_path / "d")
        assert len(verify(tmp_path / "d")[1]) >= 1
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(content)
    sae.load(tmp_path / "d")


@pytest.mark.parametrize(
    ("number", "way"),
    [(errno.EMFILE, "ulimit -n"), (errno.EACCES, "check permissions and free memory"), (errno.ENOMEM, "run the same")],
)
def test_what_the_machine_cannot_read_is_not_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, way: str
) -> None:
    TopK(4, 8, k=2).save(tmp_path)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, "open", refuse)
        with pytest.raises(UnreadableError, match=f"cannot be read \\({os.strerror(number)}\\); .*{way}") as caught:
            sae.load(tmp_path)
        assert "delete" not in str(caught.value)
    monkeypatch.setattr(reading, "load_file", lambda *_: refuse())
    with pytest.raises(UnreadableError, match=way):
        sae.load(tmp_path)


def test_a_file_that_only_safetensors_cannot_open_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so wherever the system refuses to open it, be it for too many open files."""
    TopK(4, 8, k=2).save(tmp_path)

    def refuse(*_: object) -> None:
        raise FileNotFoundError("No such file or directory: weights.safetensors")

    monkeypatch.setattr(reading, "load_file", refuse)
    with pytest.raises(UnreadableError, match="check permissions and free memory"):
        sae.load(tmp_path)


def test_memory_that_is_too_small_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TopK(4, 8, k=2).save(tmp_path)

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError), reading.taken_apart(tmp_path / "config.json"):
        refuse()
    monkeypatch.setattr(torch.Tensor, "to", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        sae.load(tmp_path)
    with pytest.raises(ConfigError, match=r"device 'meta': not available here .*use device=auto or device=cpu"):
        choose_device("meta")


def test_a_folder_whose_name_is_not_utf8_is_to_be_renamed(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    TopK(4, 8, k=2).save(folder)
    with pytest.raises(UnreadableError, match=r"the path is not UTF-8.*; rename the folder"):
        sae.load(folder)
    [problem] = verify(folder)[1]
    assert problem.endswith("rename the folder")
    folder.rename(tmp_path / "renamed")
    sae.load(tmp_path / "renamed")


def test_folders_without_hashes_are_read_and_say_so_once(tmp_path: Path) -> None:
    TopK(4, 8, k=2).save(tmp_path / "d")
    (tmp_path / "d" / SUMS).unlink()
    with pytest.warns(
        UnhashedWarning, match=r"config.json has no SHA-256 in SHA256SUMS.*'sae verify --record'"
    ) as seen:
        sae.load(tmp_path / "d")
        sae.load(tmp_path / "d")
    assert len(seen) == 1
    with pytest.warns(UnhashedWarning, match=r"2 files have no hash in SHA256SUMS and cannot be compared"):
        assert verify(tmp_path / "d") == (0, [])
    assert [path.name for path in record_hashes(tmp_path / "d")] == ["config.json", "weights.safetensors"]
    assert verify(tmp_path / "d") == (2, [])


def test_a_run_folder_without_hashes_says_so_in_one_line(tmp_path: Path) -> None:
    places = ("dictionary", "checkpoints/step-00000001", "snapshots/step-00000002")
    for place in places:
        TopK(4, 8, k=2).save(tmp_path / "run" / place)
        (tmp_path / "run" / place / SUMS).unlink()
    (tmp_path / "run" / "config.yaml").write_text("out: run\n")
    with pytest.warns(UnhashedWarning) as seen:
        for place in places:
            sae.load(tmp_path / "run" / place)
    [line] = [str(warning.message) for warning in seen]
    assert line.startswith(f"'{tmp_path / 'run'}': dictionary/config.json has no SHA-256")


def test_settling_keeps_what_is_there(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"one")
    with (tmp_path / SUMS).open("a") as file:
        file.write(f"# before {sha(b'two')}  a\n")
    assert recorded(tmp_path / "a") == (sha(b"one"), sha(b"two"))
    settle(tmp_path)
    assert recorded(tmp_path / "a") == (sha(b"one"),)


def test_commands_end_with_one_line_where_a_fifo_stands(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    command = [sys.executable, "-m", "sae.cli.main", "eval", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "a FIFO where a file should be" in done.stderr and len(done.stderr.splitlines()) == 1
