"""Labelled files: what is read from them, and one clear line where they cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from sae.errors import ConfigError, DataError
from sae.probing.data import DataFile, LabelledTexts, find_data
from sae.probing.settings import ProbeConfig

AWKWARD = ['a "quoted", thing\nover two lines', "plain", "x" * 300_000, "Ünïcode → 東京"]


def read(path: Path, **settings) -> LabelledTexts:
    [file] = find_data([str(path)])
    return file.read(ProbeConfig(**settings))


def write_csv(path: Path, header: str, rows: list[tuple[str, str]]) -> Path:
    quoted = ['"{}",{}'.format(text.replace('"', '""'), label) for text, label in rows]
    path.write_text("\n".join([header, *quoted]) + "\n", encoding="utf-8")
    return path


def compress(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.zst")
    with pyarrow.output_stream(str(packed), compression="zstd") as stream:
        stream.write(path.read_bytes())
    path.unlink()
    return packed


@pytest.mark.parametrize("packed", [False, True])
def test_csv(tmp_path: Path, packed: bool) -> None:
    path = write_csv(tmp_path / "set.csv", "prompt,target", list(zip(AWKWARD, ["1", "0", "True", "01"], strict=True)))
    data = read(compress(path) if packed else path)
    assert data == LabelledTexts("set", tuple(AWKWARD), ("1", "0", "True", "01"))


def test_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(AWKWARD)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert read(tmp_path / "a.jsonl") == LabelledTexts("a", tuple(AWKWARD), ("0", "1", "0", "1"))
    assert read(tmp_path / "b.parquet") == LabelledTexts("b", tuple(AWKWARD), ("0", "1", "0", "1"))


def test_spans(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "Anna sang", "spans": [[0, 4, "name"]]}\n{"text": "hm", "spans": []}\n')
    assert read(tmp_path / "a.jsonl") == LabelledTexts("a", ("Anna sang", "hm"), spans=(((0, 4, "name"),), ()))
    (tmp_path / "b.jsonl").write_text('{"text": "Anna", "spans": [[0, "name"]]}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "Anna", "spans": [[0, 4, {"a": 1}]]}\n')
    for name in ("b.jsonl", "c.jsonl"):
        with pytest.raises(DataError, match=r"row 1: spans=.*expected a list of \[first character"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": [132, 655, 0], "label": 0}, r"row 2: column 'text' holds a list of numbers \(132, …\); expected t"),
        ({"text": [{"role": "user"}], "label": 0}, "row 2: column 'text' holds a list of objects; expected text: set"),
        ({"text": 3.5, "label": 0}, r"row 2: column 'text' holds a number \(3.5\)"),
        ({"text": 0, "label": 0}, r"row 2: column 'text' holds a number \(0\)"),
        ({"text": [], "label": 0}, "row 2: column 'text' holds an empty list"),
        ({"text": "b", "label": {"a": 1}}, "row 2: column 'label' holds an object with 'a'; expected text, a numbe"),
    ],
)  # fmt: skip
def test_what_is_no_text_and_no_label_is_refused(row: dict, message: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, row]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.table({key: [row[key]] * 2 for key in row}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=message.replace("row 2", "row 1")):
        read(tmp_path / "b.parquet")


NAN = float("nan")


@pytest.mark.parametrize(
    ("labels", "names", "left_out"),
    [
        ([1, 1.0, True, 0, 0.0, False, 0.5], ["1", "1", "1", "0", "0", "0", "0.5"], 0),
        ([True, False], ["True", "False"], 0),
        ([1.0, NAN, 0.0, None], ["1", "0"], 2),
        (["x", None, "", "nan", "1.0"], ["x", "nan", "1.0"], 2),
        ([1e300, 2**53, 2.0**53, -0.0, 10**400], [str(int(1e300)), str(2**53), str(2**53), "0", str(10**400)], 0),
        (["\ud83d"], ["?"], 0),
    ],
)  # fmt: skip
def test_labels_are_text_or_numbers_and_truth_values(
    labels: list, names: list[str], left_out: int, tmp_path: Path
) -> None:
    rows = [{"text": "a", "label": label} for label in labels]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": None, "label": labels[0]}])))
    data = read(tmp_path / "a.jsonl")
    assert (list(data.labels), data.left_out) == (names, left_out + 1)
    spans = [{"text": "a", "spans": [[0, 1, label]]} for label in labels]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, spans)))
    data = read(tmp_path / "b.jsonl")
    assert [label for [(_, _, label)] in data.spans if label is not None] == names
    assert (len(data.spans), data.left_out) == (len(labels), left_out)


def test_labels_of_a_table_with_gaps(tmp_path: Path) -> None:
    """As pandas writes whole numbers of which some are missing."""
    parquet.write_table(pyarrow.table({"text": ["a"] * 3, "label": [1.0, NAN, 0.0]}), tmp_path / "a.parquet")
    data = read(tmp_path / "a.parquet")
    assert (data.labels, data.left_out) == (("1", "0"), 1)


def test_text_beside_numbers_is_refused(tmp_path: Path) -> None:
    for labels, message in (
        (
            [None, "x", "y", 1],
            r"row 4: column 'label' has the label a number \(1\), and 'x' in row 2; expected text",
        ),
        (
            [0, True, "1"],
            r"row 3: column 'label' has the label '1', and a number \(0\) in row 1; expected text",
        ),
    ):
        for name, of_row in (("label", lambda label: label), ("spans", lambda label: [[0, 1, label]])):
            rows = [{"text": "a", name: of_row(label)} for label in labels]
            (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
            with pytest.raises(DataError, match=message.replace("'label'", f"'{name}'")):
                read(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="row 1: spans="):
        (tmp_path / "a.jsonl").write_text('{"text": "a", "spans": [[0, Infinity, "x"]]}')
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", ["csv", "csv.zst", "jsonl", "parquet"])
def test_a_name_that_is_no_text(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad\udcff.{kind.removesuffix('.zst')}"
    if kind == "jsonl":
        path.write_text('{"text": "a", "label": 1}')
    elif kind == "parquet":
        with path.open("wb") as file:
            parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), file)
    else:
        write_csv(path, "text,label", [("a", "1")])
    if kind == "csv.zst":
        with (tmp_path / f"{path.name}.zst").open("wb") as file, pyarrow.output_stream(file, compression="zstd") as out:
            out.write(path.read_bytes())
        path = tmp_path / f"{path.name}.zst"
    assert read(path) == LabelledTexts("bad\\xff", ("a",), ("1",))


def test_lines_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a", "label": 1}\n')
    assert read(tmp_path / "a.jsonl").texts == ("a",)


@pytest.mark.parametrize(("line", "reason"), [("9" * 5000, "Exceeds the limit"), ("[" * 100_000, "nested too deeply")])
def test_json_that_cannot_be_parsed(line: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": ' + line)
    with pytest.raises(DataError, match=rf"line 2 is not JSON \({reason}"):
        read(tmp_path / "a.jsonl")


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "set.csv", "question,kind", [("what", "a"), ("who", "b")])
    assert read(path, text="question", label="kind").labels == ("a", "b")
    with pytest.raises(DataError, match=r"no column 'text' or 'prompt'; set text=COLUMN to one of: question, kind"):
        read(path)
    with pytest.raises(DataError, match=r"no column 'sort'; set label=COLUMN to one of: question"):
        read(path, text="question", label="sort")


def test_rows_without_text_or_label_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "set.csv", "text,label", [("a", "1"), ("", "1"), ("b", ""), ("c", "0")])
    data = read(path)
    assert (data.texts, data.labels, data.left_out) == (("a", "c"), ("1", "0"), 2)
    with pytest.raises(DataError, match="no row has both a 'text' and a 'label'"):
        read(write_csv(tmp_path / "none.csv", "text,label", [("", "1")]))


def test_damaged_files(tmp_path: Path) -> None:
    whole = compress(write_csv(tmp_path / "set.csv", "text,label", [("word " * 500, str(n)) for n in range(50)]))
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a complete CSV file"):
        read(whole)
    for name, content in (
        ("a.jsonl", b"{broken\n"),
        ("b.jsonl", b"[1]\n"),
        ("c.parquet", b"no"),
        ("d.csv", b"\xff,\n1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


def test_places(tmp_path: Path) -> None:
    for name in ("b.csv", "a.jsonl", "notes.md"):
        (tmp_path / name).write_text("")
    assert [file.name for file in find_data([str(tmp_path)])] == ["a", "b"]
    assert [file.name for file in find_data([str(tmp_path / "b.csv"), str(tmp_path)])] == ["b", "a"]
    with pytest.raises(DataError, match=r"notes.md': expected a file that ends in .csv, .csv.zst, .jsonl, .parquet"):
        find_data([str(tmp_path / "notes.md")])
    with pytest.raises(DataError, match=r"no such file or folder; give a \.csv"):
        find_data([str(tmp_path / "missing.csv")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no file that ends in"):
        find_data([str(tmp_path / "empty")])
    (tmp_path / "empty" / "b.csv").write_text("")
    with pytest.raises(DataError, match="is called 'b' as well; rename one"):
        find_data([str(tmp_path), str(tmp_path / "empty")])


def unpacked_wheel(folder: Path) -> Path:
    """Laid out as sae-probes 0.4.2 is."""
    data = folder / "sae_probes" / "data"
    (data / "cleaned_data").mkdir(parents=True)
    (folder / "sae_probes" / "__init__.py").write_text("raise RuntimeError('imported')")
    master = data / "probing_datasets_MASTER.csv"
    master.write_text(
        '"Source","Dataset save name","Data type"\n'
        '"x","cleaned_data/5_is_male.csv","Binary Classification"\n'
        '"","cleaned_data/8_latitude.csv","Continuous Data"\n'
        '"","cleaned_data/131_temp_Typical Time.csv","Binary Classification"\n'
    )
    compress(master)
    for name in ("5_is_male", "8_latitude", "131_temp_Typical Time"):
        compress(write_csv(data / "cleaned_data" / f"{name}.csv", "prompt,prompt_len,target", [("Ann", "3,0")]))
    return folder


def test_the_binary_data_sets_of_sae_probes_from_a_folder(tmp_path: Path) -> None:
    folder = unpacked_wheel(tmp_path / "wheel")
    for place in (folder, folder / "sae_probes", folder / "sae_probes" / "data"):
        files = find_data([str(place)])
        assert [file.name for file in files] == ["5_is_male", "131_temp_Typical Time"]
    assert files[0].read(ProbeConfig()) == LabelledTexts("5_is_male", ("Ann",), ("0",))
    files[0].path.unlink()
    with pytest.raises(DataError, match="lists it, but it does not exist; unpack the wheel again"):
        find_data([str(folder)])


def test_the_installed_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"the package is not installed; 'pip install --no-deps sae-probes==0.4.2'"):
        find_data(["sae-probes"])
    monkeypatch.syspath_prepend(unpacked_wheel(tmp_path / "site"))
    assert [file.name for file in find_data(["sae-probes"])] == ["5_is_male", "131_temp_Typical Time"]
    assert "sae_probes" not in sys.modules


def test_hashes_are_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"abc")
    file = DataFile("a", tmp_path / "a.csv")
    assert file.sha256() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a.csv").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        file.sha256()


def test_pyarrow_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_csv(tmp_path / "set.csv", "text,label", [("a", "1")])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"need pyarrow, from the package's extra: pip install 'sae\[lm\]'"):
        read(path)
