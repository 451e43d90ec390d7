from __future__ import annotations

import itertools
import json
import os
import random
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from sae.config.mixture import source_labels
from sae.config.sources import DataConfig
from sae.config.splits import HELD_OUT, TRAIN
from sae.errors import DataError
from sae.text.corpus import Document, check_apart, check_revision, is_held_out, read_documents, standard_library
from sae.text.document import TokenIds
from sae.text.prepared import prepared_documents

TEXTS = ["One.", "Two, and ü × 漢字.\n", "Three"]


def write_jsonl(path: Path, column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "other": 1}) + "\n\n" for text in TEXTS), encoding="utf-8")
    return path


def write_parquet(path: Path, column: str = "text") -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({column: [*TEXTS, None], "other": [1, 2, 3, 4]}), path)
    return path


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[1], encoding="utf-8")
    assert list(read_documents(str(tmp_path / "a.txt"))) == [Document("a.txt", TEXTS[1])]


def test_jsonl_names_documents_by_line_and_skips_blank_ones(tmp_path: Path) -> None:
    documents = list(read_documents(str(write_jsonl(tmp_path / "a.jsonl", "body")), column="body"))
    assert documents == [Document(f"a.jsonl:{line}", text) for line, text in zip((1, 3, 5), TEXTS, strict=True)]


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    """JSON may escape half a character, which has no UTF-8; both halves together are one."""
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b"}' + "\n" + r'{"text": "\ud83d\ude00"}', encoding="utf-8")
    assert [document.text for document in read_documents(str(tmp_path / "a.jsonl"))] == ["a?b", "\U0001f600"]


def test_parquet_reads_null_as_empty(tmp_path: Path) -> None:
    documents = list(read_documents(str(write_parquet(tmp_path / "a.parquet"))))
    assert documents == [Document(f"a.parquet:{row}", text) for row, text in enumerate([*TEXTS, ""])]


def test_folder_is_read_in_the_order_of_its_paths_and_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.md").write_text("deep", encoding="utf-8")
    (tmp_path / "b.txt").write_text("shallow", encoding="utf-8")
    (tmp_path / "b.png").write_bytes(b"\xff\xfe")
    write_jsonl(tmp_path / "c.jsonl")
    names = [document.name for document in read_documents(str(tmp_path))]
    assert names == ["b.txt", "c.jsonl:1", "c.jsonl:3", "c.jsonl:5", "z/a.md"]


def test_saved_dataset_and_its_splits(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"validation": rows}).save_to_disk(str(tmp_path / "dict"))
    expected = [Document(str(row), text) for row, text in enumerate(TEXTS)]
    assert list(read_documents(str(tmp_path / "one"))) == expected
    assert list(read_documents(str(tmp_path / "dict"), split="validation")) == expected
    with pytest.raises(DataError, match=r"dict': no split 'train'; it has validation"):
        list(read_documents(str(tmp_path / "dict")))
    with pytest.raises(DataError, match=r"one, row 0: no column 'body'; set data.column to one of: text"):
        list(read_documents(str(tmp_path / "one"), column="body"))


def test_saved_dataset_with_a_format(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"ids": [[1, 2], [3]], "text": TEXTS[:2]})
    rows.set_format("torch", columns=["ids"])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "dict"))
    for source in (tmp_path / "one", tmp_path / "dict"):
        found = [document.text for document in read_documents(str(source), column="ids")]
        assert [content.ids.tolist() for content in found if isinstance(content, TokenIds)] == [[1, 2], [3]]
        assert [document.text for document in read_documents(str(source))] == TEXTS[:2]


def test_damaged_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not a complete saved data set"):
        list(read_documents(str(tmp_path)))


def test_standard_library_is_deterministic_and_free_of_duplicates() -> None:
    first = list(itertools.islice(standard_library(), 400))
    assert first == list(itertools.islice(standard_library(), 400))
    assert len({document.name for document in first}) == 400
    assert len({document.text for document in first}) == 400
    assert min(len(document.text) for document in first) >= 400
    assert any(document.name.startswith("topics/") for document in first)
    root = Path(sysconfig.get_path("stdlib"))
    source = next(document for document in first if not document.name.startswith("topics/"))
    assert source.text == (root / source.name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"caf\xe9 au lait", r"bad.txt': not UTF-8 text \(invalid continuation byte at byte 3\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', r"bad.jsonl': line 2 is not JSON \(Expecting value\)"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"latin.jsonl': line 2 is not JSON \(invalid cont"),
        ("list.jsonl", b"[1, 2]\n", r"list.jsonl, line 1: no column 'text'; set data.column to one of: none"),
        ("other.jsonl", b'{"body": "a", "id": 3}\n', r"no column 'text'; set data.column to one of: body, id"),
        ("bad.parquet", b"PAR1 not really", r"bad.parquet': not a parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=message) as caught:
            list(read_documents(str(source)))
        assert "\n" not in str(caught.value)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.parquet: no column 'body'; set data.column to one of: text, other"):
        list(read_documents(str(write_parquet(tmp_path / "a.parquet")), column="body"))


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    for missing in (str(tmp_path / "nothing"), "./nothing", "nothing.jsonl"):
        with pytest.raises(DataError, match=r"nothing.*': no such file or folder"):
            read_documents(missing)
    with pytest.raises(DataError, match=r"the folder holds no .txt, .md, .jsonl, .*, .parquet file"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize(
    "check", [read_documents, lambda source: check_revision([source], "v1"), lambda source: check_apart([source])]
)
def test_a_source_that_cannot_be_a_path(check: Any) -> None:
    with pytest.raises(DataError, match=r"data source 'x{80}…': File name too long; name a file, a folder or a hub d"):
        check("x" * 300)


def test_the_home_folder_of_nobody() -> None:
    with pytest.raises(DataError, match=r"data source '~nosuchuser/x': no such file or folder"):
        read_documents("~nosuchuser/x")


def test_names_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt")).write_text("coffee")
    (tmp_path / "thé.txt").write_text("tea", encoding="utf-8")
    assert {document.name for document in read_documents(str(tmp_path))} == {"caf\\xe9.txt", "thé.txt"}
    assert source_labels([os.fsdecode(b"a/caf\xe9")]) == ("caf\\xe9",)


def test_unknown_hub_dataset_gives_one_line() -> None:
    with pytest.raises(DataError, match=r"data source 'nobody/nothing': neither a folder nor a file") as caught:
        list(read_documents("nobody/nothing"))
    assert "\n" not in str(caught.value)
    assert "stdlib" in str(caught.value)


def test_stream_that_breaks_off_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows():
        yield {"text": "one"}
        raise ConnectionError("the network went away\nand more")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    stream = read_documents("somebody/something")
    assert next(stream) == Document("0", "one")
    with pytest.raises(DataError, match=r"row 1 could not be read \(the network went away\)"):
        next(stream)


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_held_out_share_is_binomial(fraction: float) -> None:
    count = 20_000
    held_out = sum(is_held_out(f"document {number}", 0, fraction) for number in range(count))
    assert abs(held_out - count * fraction) < 4 * (count * fraction * (1 - fraction)) ** 0.5


def test_held_out_sets_of_two_seeds_are_independent_and_nested_in_the_fraction() -> None:
    names = [f"{number}.txt" for number in range(10_000)]
    first, second = ({name for name in names if is_held_out(name, seed, 0.2)} for seed in (0, 1))
    assert abs(len(first & second) - 400) < 4 * (10_000 * 0.04 * 0.96) ** 0.5
    assert {name for name in names if is_held_out(name, 0, 0.1)} < first


def test_split_depends_on_the_names_only(tmp_path: Path) -> None:
    names = [f"{number:03d}.txt" for number in range(40)]
    for folder, text in (("a", "some text"), ("b", "another text altogether")):
        (tmp_path / folder).mkdir()
        for name in names if folder == "a" else names[::2]:
            (tmp_path / folder / name).write_text(f"{text} {name}", encoding="utf-8")
    a, b = (
        {
            name: split
            for name, _, split in prepared_documents(DataConfig(source=str(tmp_path / x), holdout_fraction=0.4))
        }
        for x in "ab"
    )
    assert set(a.values()) == {TRAIN, HELD_OUT}
    assert b == {name: a[name] for name in names[::2]}


def test_sections_rejoin_to_the_document_and_stay_on_its_side(text_folder: Path) -> None:
    config = DataConfig(source=str(text_folder), section_characters=200, holdout_fraction=0.3)
    sections: dict[str, list[tuple[str, str]]] = {}
    for name, text, split in prepared_documents(config):
        sections.setdefault(name.partition("#")[0], []).append((text, split))
    for document in read_documents(str(text_folder)):
        texts, splits = zip(*sections[document.name], strict=True)
        assert "".join(texts) == document.text
        assert len(texts) > 1
        assert len(set(splits)) == 1
        assert all(text.endswith("\n") for text in texts)
        assert all(200 <= len(text) < 200 + 120 for text in texts[:-1])


def test_train_and_held_out_texts_are_disjoint(text_folder: Path) -> None:
    config = DataConfig(source=str(text_folder), section_characters=300, holdout_fraction=0.3, shuffle_documents=7)
    by_split: dict[str, set[str]] = {TRAIN: set(), HELD_OUT: set()}
    for _, text, split in prepared_documents(config):
        by_split[split] |= set(text.splitlines())
    assert min(map(len, by_split.values())) > 50
    assert not by_split[TRAIN] & by_split[HELD_OUT]


def test_shuffling_documents_is_a_repeatable_permutation(text_folder: Path) -> None:
    plain = list(prepared_documents(DataConfig(source=str(text_folder))))
    shuffled, again = (
        list(prepared_documents(DataConfig(source=str(text_folder), shuffle_documents=16))) for _ in range(2)
    )
    assert shuffled == again
    assert shuffled != plain
    assert sorted(shuffled) == sorted(plain)
    assert all(plain.index(item) <= place + 16 for place, item in enumerate(shuffled))


def test_documents_are_shuffled_as_they_were_before_streams_had_versions(text_folder: Path) -> None:
    plain = list(prepared_documents(DataConfig(source=str(text_folder))))
    config = DataConfig(source=str(text_folder), shuffle_documents=16)
    rng, buffer, expected = random.Random(0), plain[:16], []
    for item in plain[16:]:
        place = rng.randrange(16)
        expected.append(buffer[place])
        buffer[place] = item
    rng.shuffle(buffer)
    assert list(prepared_documents(config, streams=1)) == expected + buffer
    assert list(prepared_documents(config)) != expected + buffer


@pytest.mark.parametrize("source", ["stdlib", "folder", "file"])
def test_a_revision_is_of_one_hub_data_set(source: str, text_folder: Path) -> None:
    path = {"stdlib": "stdlib", "folder": str(text_folder), "file": str(next(text_folder.iterdir()))}[source]
    with pytest.raises(DataError, match=r"data.revision='v1': data source '.*' is not a hub data set, .*leave it out"):
        check_revision([path], "v1")
    with pytest.raises(DataError, match="with 2 sources: a revision is of one hub data set"):
        check_revision([path, "org/data"], "v1")
    check_revision([path, "org/data"], None)
    check_revision(["org/data"], "v1")


def test_code_in_a_folder_of_text_does_not_run(text_folder: Path, tmp_path: Path) -> None:
    """Scripts of data sets by every name that was ever looked for; only text is read."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.txt").write_text("one text", encoding="utf-8")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("set.py", "dataset.py", "__init__.py", "setup.py"):
        (folder / name).write_text(code, encoding="utf-8")
    assert [document.text for document in read_documents(str(folder))] == ["one text"]
    assert not (tmp_path / "ran").exists()
