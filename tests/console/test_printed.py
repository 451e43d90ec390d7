"""One place prints, and what comes out of files is shown by a terminal and never obeyed."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.text import Text

import sae
from sae.console.terminal import Terminal, complain, say, show_warning
from sae.files.printable import printable
from sae.results.table import Column, Table

ROOT = Path(sae.__file__).parent
PLACE = "console/terminal.py"
QUIETENED = {"model/guard.py", "model/loading.py"}
"""Where libraries' own messages are turned off."""
HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\u202eright\u2066[/][bold]x[/bold]\x08\x00\u2028end"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


def printing_places(tree: ast.AST) -> Iterator[str]:
    """Everything in a module that writes to a standard stream, or that could."""
    calls = {"print", "pprint", "Console", "get_console", "Live", "Status", "input", "breakpoint"}
    members = {
        "click": {"echo", "secho", "echo_via_pager", "prompt", "confirm", "pause", "progressbar", "get_text_stream",
                  "get_binary_stream"},
        "sys": {"stdout", "stderr", "__stdout__", "__stderr__", "displayhook", "excepthook"},
        "rich": {"print", "print_json", "get_console", "inspect"},
        "traceback": {"print_exc", "print_exception", "print_stack", "print_tb"},
        "logging": {"StreamHandler", "basicConfig", "getLogger", "warning", "error", "info"},
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in calls:
            yield f"{node.func.id}() in line {node.lineno}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name, attribute = node.value.id, node.attr
            yield from [f"{name}.{attribute} in line {node.lineno}"] if attribute in members.get(name, ()) else []
        elif isinstance(node, ast.ImportFrom) and node.module in members:
            yield from (f"from {node.module} import {one.name}" for one in node.names
                        if one.name in members[node.module])  # fmt: skip


def test_one_place_prints() -> None:
    found = {
        str(path.relative_to(ROOT)): places
        for path in sorted(ROOT.rglob("*.py"))
        if (places := list(printing_places(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert PLACE in found, "the test finds what it looks for"
    del found[PLACE]
    del found["text/chat_worker.py"]  # a process of its own, whose standard streams are pipes
    assert all("logging" in place for file in QUIETENED & found.keys() for place in found[file]), found
    others = {file: places for file, places in found.items() if file not in QUIETENED}
    assert not others, others


@pytest.mark.parametrize(
    "source",
    ["print('a')", "import click\nclick.echo('a')", "import sys\nsys.stderr.write('a')", "Console()",
     "from click import echo", "import traceback\ntraceback.print_exc()"],
)  # fmt: skip
def test_a_second_place_would_be_found(source: str) -> None:
    assert list(printing_places(ast.parse(source)))


def test_what_a_terminal_obeys_becomes_escapes() -> None:
    assert printable("a\x1b[2J\u202e\n\tb\udc80\x9b") == r"a\x1b[2J\u202e\n\tb\udc80\x9b"
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
    assert printable("naïve 日本 👩\u200d👩 [/]") == "naïve 日本 👩\u200d👩 [/]"
    for code in [*range(0xA0), 0x61C, *range(0x200E, 0x2010), *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF]:
        character = chr(code)
        assert (printable(character) == character) == character.isprintable(), hex(code)


@pytest.mark.parametrize("colour", [False, True])
def test_a_console_obeys_nothing_of_what_it_is_given(colour: bool) -> None:
    stream = io.StringIO()
    terminal = Terminal(file=stream, width=300, force_terminal=colour, color_system="truecolor" if colour else None)
    column = Column(HOSTILE, [HOSTILE, Text(HOSTILE)], is_text=True)
    for content in (HOSTILE, Text(HOSTILE), Table([column, column], HOSTILE, [HOSTILE]).in_terminal(300)):
        terminal.print(content)
    text = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()) if colour else stream.getvalue()
    assert not OBEYED.search(text)
    assert "\x1b[31m" not in stream.getvalue(), "a colour from outside"
    assert text.count(r"\x1b[31mred\x1b]0;title") == 10
    assert "[/][bold]x[/bold]" in text, "no markup"


def test_errors_warnings_and_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"out {HOSTILE}")
    complain(f"Error: {HOSTILE}\nsecond")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show_warning
        warnings.warn(f"of {HOSTILE}", stacklevel=1)
    out, err = capsys.readouterr()
    assert not OBEYED.search(out + err)
    assert out.count("\n") == 1
    assert [line.split()[0] for line in err.splitlines()] == ["Error:", "Warning:"], "one line each"


def test_no_verb_lets_a_name_out_of_a_file_through(
    tiny_model: Path, text_folder: Path, tmp_path: Path, command
) -> None:
    """Names, messages and values that carry escapes and markup, wherever a verb reads one and shows it."""
    out = tmp_path / "run [/] \x1b[31m[bold]"
    config = tmp_path / "tiny.yaml"
    settings = {
        "out": str(out), "model": {"name": str(tiny_model)},
        "data": {"source": str(text_folder), "tokens": 2000, "held_out_tokens": 400, "holdout_fraction": 0.25,
                 "context_length": 16},
        "harvest": {"hooks": ["blocks.1.hook_resid_pre"]}, "dictionary": {"d_sae": 32, "k": 4},
        "train": {"batch_size": 64, "pool_tokens": 256}, "evaluation": {"frozen_decoder_tokens": 0},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    outcomes = {"run": command("run", config), "again": command("run", config)}
    assert outcomes["run"].status == outcomes["again"].status == 0, outcomes
    assert r"run [/] \x1b[31m[bold]" in outcomes["run"].out.replace("\n", "")
    assert "fvu" in outcomes["again"].out, "what is done is shown as it was"
    other = Path(shutil.copytree(out, tmp_path / "other [/red]\x9b"))
    outcomes["compare"] = command("compare", out, other, "--out", tmp_path / "c [/]\x07")
    outcomes["features"] = command("features", out)
    outcomes["feature"] = command("features", out, 0)
    outcomes["page"] = command("features", out, "--page", tmp_path / "p [/]\x1b.html")
    outcomes["effects"] = command("effects", out, 0, 1, "--positions", 2, "--null-positions", 1)
    outcomes["eval"] = command("eval", out, "evaluation.batch_contexts=8")
    for name, outcome in outcomes.items():
        assert outcome.status == 0, (name, outcome)
    manifest = other / "activations" / "manifest.json"
    record = json.loads(manifest.read_text())
    files = record["files"]
    record["files"] = {**files, f"{HOSTILE}.safetensors": next(iter(files.values()))}
    manifest.write_text(json.dumps(record))
    outcomes["verify"] = command("verify", other)
    assert outcomes["verify"].status == 1
    (tmp_path / "keys.jsonl").write_text(json.dumps({f"{HOSTILE}": "no text"}) + "\n")
    outcomes["keys"] = command("harvest", config, f"out={tmp_path / 'k'}", f"data.source={tmp_path / 'keys.jsonl'}")
    no_nul = HOSTILE.replace("\0", "")
    outcomes["model"] = command("harvest", config, f"out={tmp_path / 'm'}", f"model.name=./{no_nul}")
    outcomes["setting"] = command("train", config, f"dictionary.{HOSTILE}=1")
    outcomes["hook"] = command("train", config, f"dictionary.reads={HOSTILE}")
    outcomes["folder"] = command("eval", f"no run {no_nul}")
    outcomes["usage"] = command(f"frobnicate {HOSTILE}")
    bad = Path(shutil.copytree(other, tmp_path / "bad"))
    text = (bad / "dictionary" / "config.json").read_text().replace('"topk"', json.dumps(HOSTILE))
    (bad / "dictionary" / "config.json").write_text(text)
    outcomes["architecture"] = command("features", bad)
    for name in ("keys", "model", "setting", "hook", "folder", "architecture"):
        assert outcomes[name].status == 1 and outcomes[name].err.count("\n") == 1, (name, outcomes[name])
    for name, outcome in outcomes.items():
        found = OBEYED.search(outcome.out + outcome.err)
        assert not found, (name, found, outcome)
        assert "Traceback" not in outcome.err and "MarkupError" not in outcome.err, (name, outcome)


def test_a_stack_trace_is_shown_and_not_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sae.cli import main as cli

    monkeypatch.setattr(sys, "argv", ["sae", "--debug", "verify", "no cache \x1b[31m"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "CacheError" in err and not OBEYED.search(err)
