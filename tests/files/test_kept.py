"""Results kept in folders: complete or missing, and read again only if they are the ones asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import sae
from sae.errors import DamagedError, FormatError
from sae.files.formats import Format
from sae.files.kept import KeptResult

KEPT = KeptResult(Format("sae-example", 3), "example.json", ("example.md",))


def write(folder: Path, text: bytes = b"text", kept: KeptResult = KEPT, **content: object) -> list[Path]:
    return kept.write(folder, content, {"example.md": text, "figures/a.bin": iter([b"one", b"two"])})


def test_the_index_begins_with_its_head_and_the_files_stand_next_to_it(tmp_path: Path) -> None:
    paths = write(tmp_path, of="this")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["example.json", "example.md", "figures/a.bin"]
    assert [path.read_bytes() for path in paths[1:]] == [b"text", b"onetwo"]
    record = json.loads(paths[0].read_text())
    assert list(record.items()) == [
        ("format", "sae-example"), ("format_version", 3), ("sae_version", sae.__version__), ("of", "this")
    ]  # fmt: skip
    assert KEPT.headed(record) == record, "a head is there once"


def test_only_the_result_that_was_asked_for_is_found(tmp_path: Path) -> None:
    assert KEPT.find(tmp_path) is None
    write(tmp_path, of="this", sizes=(1, 2), other=None)
    found = KEPT.find(tmp_path, of="this", sizes=(1, 2))
    assert found is not None and found["sizes"] == [1, 2]
    assert KEPT.find(tmp_path, of="that") is None
    assert KEPT.find(tmp_path, missing=1) is None
    assert replace(KEPT, format=Format("sae-example", 4)).find(tmp_path, of="this") is None
    assert replace(KEPT, format=Format("sae-other", 3)).find(tmp_path, of="this") is None
    (tmp_path / "example.md").unlink()
    assert KEPT.find(tmp_path, of="this") is None, "a file is missing"


def test_a_result_of_another_version_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_any = replace(KEPT, of_version=False)
    write(tmp_path / "a", of="this")
    write(tmp_path / "b", kept=of_any, of="this")
    assert "sae_version" not in json.loads((tmp_path / "b" / "example.json").read_text())
    monkeypatch.setattr("sae.files.version.__version__", "9.9.9")
    assert KEPT.find(tmp_path / "a", of="this") is None
    assert of_any.find(tmp_path / "b", of="this") is not None


@pytest.mark.parametrize("grows", [False, True])
def test_a_kill_leaves_no_result_or_the_older_one_if_it_grows(tmp_path: Path, grows: bool) -> None:
    kept = replace(KEPT, grows=grows)
    write(tmp_path, of="old", kept=kept)

    def killed() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.write(tmp_path, {"of": "new"}, {"example.md": killed()})
    assert kept.find(tmp_path, of="new") is None
    assert (kept.find(tmp_path, of="old") is not None) is grows


def test_outdated_results_are_missing_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path, of="this")
    newer = replace(KEPT, format=Format("sae-example", 4), outdated={3: "counted twice; it is counted again"})
    with pytest.warns(UserWarning, match=r"example.json': counted twice; it is counted again"):
        assert newer.find(tmp_path, of="this") is None
    assert replace(newer, outdated={}).find(tmp_path, of="this") is None, "that version has no warning"


def test_results_of_a_newer_version_are_refused_and_stay(tmp_path: Path) -> None:
    """Whatever they are of: to be made anew, the file has to be taken away."""
    write(tmp_path, of="this")
    older, before = replace(KEPT, format=Format("sae-example", 2)), (tmp_path / "example.json").read_bytes()
    for of in ("this", "that"):
        with pytest.raises(FormatError, match=r"example.json': format version 3 is newer .* \(2\); update the package"):
            older.find(tmp_path, of=of)
    assert (tmp_path / "example.json").read_bytes() == before
    assert replace(KEPT, format=Format("sae-other", 2)).find(tmp_path, of="this") is None, "not of this format at all"


def test_an_index_without_a_head(tmp_path: Path) -> None:
    plain = replace(KEPT, format=None)
    write(tmp_path, kept=plain, of="this")
    assert json.loads((tmp_path / "example.json").read_text()) == {"of": "this"}
    assert plain.find(tmp_path, of="this") == plain.read(tmp_path, "example") == {"of": "this"}


def test_an_index_that_cannot_be_read_names_the_way_out(tmp_path: Path) -> None:
    write(tmp_path, of="this")
    assert KEPT.read(tmp_path, "example")["of"] == "this"
    with pytest.raises(FormatError, match=r"example 'x': format version 3 is newer .* \(2\); choose another folder"):
        replace(KEPT, format=Format("sae-example", 2)).read(tmp_path, "example 'x'", way_out="choose another folder")
    with pytest.raises(FormatError, match=r"example 'x': format version 3 is older than this package reads \(4\)"):
        replace(KEPT, format=Format("sae-example", 5)).read(tmp_path, "example 'x'", oldest=4)
    with pytest.raises(FormatError, match=r"example 'x': example.json is not of this toolkit \(no format 'sae-other'"):
        replace(KEPT, format=Format("sae-other", 3)).read(tmp_path, "example 'x'")
    (tmp_path / "example.json").write_text("{")
    for act in (lambda: KEPT.read(tmp_path, "example"), lambda: KEPT.find(tmp_path)):
        with pytest.raises(DamagedError, match=r"example.json': damaged or changed"):
            act()
