"""Lists as pandas, NumPy, PyTorch and Python write them, against what they wrote here; and texts that look alike."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.errors import DataError
from sae.probing.data import DataFile
from sae.probing.settings import ProbeConfig
from sae.text.corpus import read_documents
from sae.text.written_lists import CELLS, is_written_list

IDS = [132, 655, 27, 404]
CHAT = [{"role": "user", "content": "it's [1]"}, {"role": "assistant", "content": 'a "b"\n\\'}]
LISTS = [
    str(IDS), str(np.array(IDS)), str(np.array(IDS * 600)), repr(np.array(IDS)), repr(np.array([IDS, IDS])),
    str(torch.tensor(IDS)), str(torch.tensor([IDS], dtype=torch.int32)), str(torch.ones(2, requires_grad=True).exp()),
    str(tuple(IDS)), f" {IDS}\n", str([None, 1]), str([np.int64(1), np.int64(2)]), str(["a", "b"]), str({1, 2}),
    str(np.array(["a", "b"])), str(np.array(CHAT, dtype=object)), str(CHAT), json.dumps(CHAT), str(CHAT[0]),
    str({"input_ids": IDS}), json.dumps({"messages": CHAT}), json.dumps(str(IDS)), "[132 655 ... 404]", "[132]",
    str(np.array([list(IDS), [1]], dtype=object)), "array([1, 2], dtype='<i4')", "np.array([1, 2])", "[True, False]",
    "tensor([1, 2], device='cuda:0', dtype=torch.int16)", "[Message(role='user', content='Hi')]", "[nan, 1e-05]",
]  # fmt: skip
TEXTS = [
    "[1] See the reference", "(1, 2) is a point.", "[...]", "(1)", '("Hello")', "[sic]", "[0-9]\\d [x]", "[-]",
    "[a, b]",
    "print('hello')", "f([1, 2])", "list(range(3))", '{"name": "x", "version": [1, 2]}', "[1, 2] + [3]", "(1 2 3)",
    "[1, 2]\n[3, 4]", "[12:30]", "[1/2]", "1 2 3", '"quoted"', '"[1] so he said"', "[[wiki]]", "[x](y)", "[1, 2", "[]",
]  # fmt: skip


@pytest.mark.parametrize("text", LISTS)
def test_a_list_that_a_program_wrote_is_one(text: str) -> None:
    assert is_written_list(text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_begins_like_one_is_text(text: str) -> None:
    assert not is_written_list(text)


def test_long_texts_take_no_longer_than_their_length() -> None:
    start = time.process_time()
    for text in ("(" * 10**6, "[" + "1" * 10**6 + "x", "[" + "1_" * 10**6, "['" + "\\'" * 10**6, "[" + "a." * 10**6):
        assert not is_written_list(text)
    assert is_written_list(f"[{'1, ' * 10**6}1]")
    assert time.process_time() - start < 30  # a quadratic search takes hours


def write(kind: str, cells: list[str], folder: Path) -> Path:
    path = folder / f"a{kind}"
    if kind == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"x": cells}), path)
    elif kind == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["x"], *([cell] for cell in cells)])
    else:
        path.write_text("".join(json.dumps({"x": cell}) + "\n" for cell in cells))
    return path


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".json", ".parquet"])
def test_a_column_of_them_is_refused_in_every_format(kind: str, tmp_path: Path) -> None:
    for cells in (["[132 655 27]"], [" ", "a text", *["(1, 2)"] * 2], ["a text", *["[1, 2]"] * 100]):
        with pytest.raises(DataError, match=r"(row|line|record) \d+: column 'x' holds a list written as text, as do "):
            list(read_documents(str(write(kind, cells, tmp_path)), column="x"))


def test_a_saved_data_set_and_probes_of_them_are_refused(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"x": ["[1 2]", "[3 4]"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved, row 0: column 'x' holds a list written as text, as do 2 of the first"):
        list(read_documents(str(tmp_path / "saved"), column="x"))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "[1 2]", "label": label}) + "\n" for label in "ab"))
    with pytest.raises(DataError, match=r"a.jsonl': column 'text' holds lists written as text; set text=COLUMN to"):
        DataFile("a", path).read(ProbeConfig())


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("lists", [1, CELLS // 2])
def test_documents_of_which_some_are_lists_are_read(lists: int, kind: str, tmp_path: Path) -> None:
    cells = ["[1, 2]"] * lists + ["import os"] * (CELLS - lists) + ["(1, 2)"] * 50
    assert [document.text for document in read_documents(str(write(kind, cells, tmp_path)), column="x")] == cells


def test_lists_in_text_files_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("[1, 2]")
    assert [document.text for document in read_documents(str(tmp_path))] == ["[1, 2]"]
