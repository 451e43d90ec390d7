"""The notebooks run without a network and draw pictures in the same cells as the stored ones; numbers may differ."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = ["first-hour", "training-and-comparing", "inside-the-model", "reusing-a-dictionary"]


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def pictures(notebook: NotebookNode) -> list[int]:
    """The numbers of the cells that show a picture."""
    return [
        number
        for number, cell in enumerate(notebook.cells)
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_draws_its_pictures(name: str, tmp_path: Path) -> None:
    stored = read(name)
    notebook = read(name)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    assert pictures(notebook) == pictures(stored)
    assert len(pictures(stored)) >= 2
    warnings = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert warnings == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_whole_and_of_no_machine(name: str) -> None:
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    text = re.sub(r'"image/png": "[^"]*"', "", (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert not re.search(r"/(work|root|home|tmp|Users)/", text)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000


def test_every_notebook_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
