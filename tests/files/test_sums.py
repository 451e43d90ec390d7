"""Lists of hashes: those of the user, damaged ones, and names that they cannot hold."""

from __future__ import annotations

from pathlib import Path

import pytest

import sae
from sae.architectures import TopK
from sae.config.file import load_config
from sae.errors import CacheError, DamagedError
from sae.files import sums
from sae.files.damage import SUMS
from sae.files.hashes import UnhashedWarning
from sae.files.reading import read_json
from sae.files.writing import delete, locked, write_bytes, write_json
from sae.runs.verification import record_hashes, verify

USERS = {
    "in folders": f"{'0' * 64}  sub/file.bin\n",
    "binary": f"{'0' * 64} *config.yaml\n",
    "of no file": "",
    "with comments and odd names": f"# mine\n\n\\{'A' * 64}  a\\nb\r\n",
    "BSD": f"SHA256 (a) = {'0' * 64}\n",
    "signed": f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n{'0' * 64}  a\n",
}


@pytest.mark.parametrize("kind", USERS)
def test_a_list_of_the_users_is_left_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / SUMS).write_text(USERS[kind], encoding="utf-8", newline="")
    before = (tmp_path / SUMS).read_bytes()
    (tmp_path / "config.yaml").write_text("seed: 3", encoding="utf-8")
    assert load_config(tmp_path / "config.yaml").seed == 3
    if not before:
        return  # an empty one may as well be the toolkit's
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": 2})
    with pytest.warns(UnhashedWarning, match=f"which sae did not write: .*; rename that {SUMS}, and"):
        assert read_json(tmp_path / "a.json") == {"a": 2}
    delete(tmp_path / "a.json")
    with locked(tmp_path, "test"):
        sums.record(tmp_path / "config.yaml")
    assert (tmp_path / SUMS).read_bytes() == before
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(CacheError, match="nothing there that sae wrote"):
        verify(tmp_path)


def test_hashes_are_not_added_to_a_list_of_the_users(tmp_path: Path) -> None:
    (tmp_path / SUMS).write_text(USERS["binary"], encoding="utf-8")
    write_json(tmp_path / "eval.json", {})
    with pytest.raises(CacheError, match=f"{SUMS}': sae did not write it and does not change it; rename it"):
        record_hashes(tmp_path)


def test_whatever_bit_of_the_list_is_flipped_nothing_damaged_is_read(tmp_path: Path) -> None:
    """It is an error, or the file is known by its hash as before."""
    write_bytes(tmp_path / "a", b"{}")
    content = (tmp_path / SUMS).read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / SUMS).write_bytes(flipped)
        try:
            names = sums.read_sums(tmp_path)
        except DamagedError:
            continue
        assert len(names) == 1 and not sums.is_users(tmp_path), bit
    for size in range(1, len(content)):
        (tmp_path / SUMS).write_bytes(content[:size])
        if size == content.index(b"\n") + 1:
            assert sums.read_sums(tmp_path) == {}
        else:
            with pytest.raises(DamagedError, match="is incomplete"):
                sums.read_sums(tmp_path)


@pytest.mark.parametrize("content", [b"\0" * 300, b'{"json": "of another file"}\n'])
def test_a_list_that_is_none_is_damage_beside_files_of_the_toolkit(tmp_path: Path, content: bytes) -> None:
    TopK(4, 8, k=2).save(tmp_path)
    (tmp_path / SUMS).write_bytes(content)
    with pytest.raises(DamagedError, match=f"{SUMS}': damaged"):
        sae.load(tmp_path)
    assert len(verify(tmp_path)[1]) >= 1


@pytest.mark.parametrize("name", ["new\nline", "bad\udcff"])
def test_a_name_that_a_list_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    write_bytes(tmp_path / "good", b"1")
    with pytest.raises(CacheError, match="SHA256SUMS cannot list a name with a line end, or one that is not UTF-8; ch"):
        write_bytes(tmp_path / name, b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [SUMS, "good"]
    (tmp_path / name).write_bytes(b"2")
    with pytest.raises(CacheError, match="cannot list a name"):
        sums.record(tmp_path / name)
    assert sums.read_sums(tmp_path).keys() == {"good"}
