"""`sae text`: texts from arguments, files and standard input, in the terminal and as a page."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import sae
from tests.conftest import Command, assert_refused


def test_a_text_in_the_terminal(run_folder: Path, tiny_model: Path, command: Command) -> None:
    done = command("text", run_folder, "the river = a stone", "--top", 4, "--per-token", 2)
    assert done.status == 0, done.err
    model, dictionary = sae.LanguageModel(tiny_model), sae.load(run_folder)
    result = sae.text_features(dictionary, model, "the river = a stone", top=4, store=run_folder)
    rows = [line.split() for line in done.out.splitlines()]
    assert ["0", "<|endoftext|>", "masked"] in rows
    token = result.tokens[3]
    row = next(row for row in rows if row and row[0] == "3")
    assert str(len(token.firing)) in row
    assert [str(firing.feature) for firing in token.firing[:2]] == row[-4::2]
    listed = [row for row in rows if row and row[0] in {str(one.feature) for one in result.features} and len(row) > 5]
    assert [int(row[0]) for row in listed][-4:] == [one.feature for one in result.features]
    assert "usual" in done.out and "density" in done.out and "fires on" in done.out
    strongest = result.features[0]
    assert strongest.position is not None
    assert f"«{result.tokens[strongest.position].text}»" in done.out


@pytest.mark.parametrize("columns", ["40", "200"])
def test_any_width(run_folder: Path, command: Command, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = command("text", run_folder, "the river and the stone")
    assert done.status == 0
    assert max(len(line) for line in done.out.splitlines()) <= int(columns)


def test_files_and_standard_input(
    run_folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.txt").write_text("the river", encoding="utf-8")
    expected = command("text", run_folder, "the river").out
    assert command("text", run_folder, "--file", tmp_path / "one.txt").out == expected
    for words in (("-",), ()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the river"))
        assert command("text", run_folder, *words).out == expected
    both = command("text", run_folder, "the river", "--file", tmp_path / "one.txt").out
    assert both == f"{expected}\n{expected}"


def test_settings_of_the_run_are_no_texts(run_folder: Path, command: Command) -> None:
    expected = command("text", run_folder, "x=1").out
    done = command("text", run_folder, "x=1", "device=cpu", "model.trust_remote_code=false")
    assert (done.status, done.out) == (0, expected), done.err
    assert_refused(
        command("text", run_folder, "a", "seed=1"), "'seed=1': a setting", "If it is a text, give it with --file, or on"
    )


def test_undecodable_bytes_of_an_argument(run_folder: Path, command: Command) -> None:
    done = command("text", run_folder, "the river\udcff")
    assert (done.status, done.out) == (0, command("text", run_folder, "the river?").out), done.err


def test_undecodable_bytes_of_standard_input(
    run_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = command("text", run_folder, "the river\ufffd").out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the river\xff"), encoding="utf-8"))
    done = command("text", run_folder, "-")
    assert (done.status, done.out) == (0, expected), done.err


def test_chosen_features(run_folder: Path, command: Command) -> None:
    done = command("text", run_folder, "the river", "--feature", 5, "--feature", 60)
    rows = [line.split()[0] for line in done.out.partition("Features")[2].splitlines() if line.strip()]
    assert [row for row in rows if row in ("5", "60")] == ["5", "60"]
    assert_refused(
        command("text", run_folder, "the river", "--feature", 64), "feature 64: the dictionary has features 0"
    )


def test_a_dictionary_without_a_run_needs_a_model(
    run_folder: Path, tiny_model: Path, command: Command, tmp_path: Path
) -> None:
    """And is shown as in the run, without what the store knows."""
    folder = tmp_path / "alone"
    sae.load(run_folder).save(folder)
    assert_refused(command("text", folder, "a"), "tiny")  # the name in its files, which is that of no model here
    done = command("text", folder, "the river", "--model", tiny_model)
    assert done.status == 0, done.err
    assert "density" not in done.out
    assert done.out.splitlines()[:5] == command("text", run_folder, "the river").out.splitlines()[:5]
    assert_refused(
        command("text", folder, "a", "--model", tiny_model, "--max-density", 0.1), "from a feature store only"
    )


def test_a_store_of_another_dictionary_is_not_used(run_folder: Path, command: Command, tmp_path: Path) -> None:
    run_folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    dictionary = sae.load(run_folder)
    dictionary.b_enc.data += 0.01
    dictionary.save(run_folder / "dictionary")
    done = command("text", run_folder, "the river")
    assert done.status == 0, done.err
    assert "density" not in done.out


def test_a_page(run_folder: Path, command: Command, tmp_path: Path) -> None:
    page = tmp_path / "text.html"
    done = command("text", run_folder, "the river", "</script><b>", "--page", page)
    assert (done.status, done.out.strip()) == (0, f"2 texts in {page}"), done.err
    content = page.read_text(encoding="utf-8")
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', content)[0])
    assert "".join(data["texts"][1]["tokens"][1:]) == "</script><b>"
    assert_refused(command("text", run_folder, "a", "--page", tmp_path / "no" / "folder" / ("x" * 300)), "x" * 20)


def test_what_is_no_text_is_refused(
    run_folder: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal: Any = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert_refused(
        command("text", run_folder), "there is no text: give one after RUN, with --file FILE, or on standard"
    )
    assert_refused(command("text", run_folder, "--file", tmp_path / "no.txt"), "No such file", "give a text file")
    (tmp_path / "long.txt").write_text("a" * 1_000_001)
    assert_refused(command("text", run_folder, "--file", tmp_path / "long.txt"), "more than 1,000,000 characters")
    assert_refused(command("text", tmp_path, "a"), "no")
