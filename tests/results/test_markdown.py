"""Names in Markdown and JSON are shown, never obeyed: by a terminal, by Markdown, or by a reader of bytes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae.files.printable import json_text
from sae.results.markdown import code, document, pipe_table, plain
from tests.conftest import Command

NAME = "\x1b[31m\x1b]0;t\x07\x9b2J\u202e\u2066|`<b>[x](y)\u2028\nnaïve"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def test_a_name_is_one_code_span_or_plain_text() -> None:
    assert code("a`b\x1b[0m\nc") == r"`aˋb\x1b[0m\nc`"
    assert plain("a_b.c (k 4)") == "a_b.c (k 4)"
    assert plain("*b* _i_ a_b ~s~ &lt; R&D http://x.y www.x.y a@b.c") == (
        r"\*b\* \_i\_ a_b \~s\~ \&lt; R&D http\://x.y www\.x.y a\@b.c"
    )
    assert plain("[x](y)<b>`\x9b") == "\\[x\\](y)\\<b>\\`\\\\x9b"


def test_no_cell_leaves_its_table() -> None:
    table = pipe_table(["", f"head {NAME}"], [[code(NAME), plain(NAME)]], text_columns=1)
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()] == [3, 3, 3]
    assert table.splitlines()[1] == "| :-- | --: |"
    assert not OBEYED.search(table) and "naïve" in table


def test_a_document_obeys_nothing_that_got_into_it() -> None:
    assert document(["# a", f"b{chr(0x9B)}\tc\n"]) == "# a\n\nb\\x9b\\tc\n".replace("\\t", "\t")
    assert document(["a\n", "b\n"], "\n") == "a\n\nb\n"


def test_json_escapes_what_is_obeyed_and_gives_the_same_back() -> None:
    content = {NAME: [NAME, 1.5, None], "日本 👩\u200d👩": "\U000e0041\x7f"}
    for indent in (None, 2):
        text = json_text(content, indent=indent)
        assert json.loads(text) == content
        assert not OBEYED.search(text) and r"\u009b2J\u202e\u2066" in text and "日本 👩\u200d👩" in text
    assert json_text("\U000e0041") == r'"\udb40\udc41"'
    assert json_text({"a": [1, "é"]}, indent=1) == json.dumps({"a": [1, "é"]}, indent=1, ensure_ascii=False)


@pytest.mark.slow
def test_no_file_of_any_verb_holds_a_name_that_a_terminal_obeys(
    tiny_model: Path, text_folder: Path, tmp_path: Path, command: Command
) -> None:
    """Model, text, run folder, comparison, labelled data and labels are all named so."""
    name = NAME.replace("/", "").replace("\n", "")
    model = Path(shutil.copytree(tiny_model, tmp_path / f"m{name}"))
    texts = tmp_path / f"t{name}"
    texts.mkdir()
    for path in text_folder.iterdir():
        shutil.copy(path, texts / f"{name}{path.name}")
    settings: dict[str, Any] = {
        "model": {"name": str(model)},
        "data": {"source": str(texts), "tokens": 500, "held_out_tokens": 200, "holdout_fraction": 0.25,
                 "context_length": 16},
        "harvest": {"hooks": ["blocks.1.hook_resid_pre"]}, "dictionary": {"d_sae": 32, "k": 4},
        "train": {"batch_size": 64, "pool_tokens": 256},
        "evaluation": {"frozen_decoder_tokens": 0, "legacy_tokens": 0, "downstream_tokens": 64, "baseline_tokens": 64},
    }  # fmt: skip
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings))
    labelled = tmp_path / f"labels{name}.csv"
    rows = [f'"the {word} door {number}","{word}{name}"' for number in range(20) for word in ("red", "cold")]
    labelled.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    run, swept, compared = (tmp_path / f"{verb}{name}" for verb in ("run", "sweep", "compare"))
    lines = [
        ("run", config, f"out={run}"),
        ("probe", run, labelled),
        ("effects", run, 0, "--positions", 2, "--null-positions", 1),
        ("sweep", config, f"out={swept}", "sweep.dictionary.k=[2,3]", f"harvest.cache={run / 'activations'}"),
        ("compare", run, swept / "k2", "--out", compared),
        ("features", run, "--page", tmp_path / "page.html"),
    ]  # fmt: skip
    for line in lines:
        outcome = command(*line)
        assert outcome.status == 0, (line, outcome)
    written = [
        path
        for folder in (run, swept, compared)
        for path in folder.rglob("*")
        if path.suffix in (".md", ".json", ".yaml") and path.parent.name != "activations"
    ] + [tmp_path / "page.html", run / "activations" / "manifest.json"]
    for path in written:
        found = OBEYED.search(path.read_text(encoding="utf-8").replace("\t", ""))
        assert not found, (path.relative_to(tmp_path), found)
    markdowns = {path.name: path.read_text(encoding="utf-8") for path in written if path.suffix == ".md"}
    assert set(markdowns) == {"eval.md", "probe.md", "effects.md", "sweep.md", "compare.md"}
    for file, text in markdowns.items():
        assert r"\x9b2J\u202e" in text.replace("\\\\", "\\"), f"{file}: the name is shown"
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["source"] == str(texts)
    assert command("verify", run, swept, compared).status == 0
