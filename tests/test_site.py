"""The documentation site: it builds without warnings, has every public name, and answers questions in its search."""

from __future__ import annotations

import contextlib
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from py_mini_racer import MiniRacer

import sae
from sae.cli.main import cli
from sae.config.base import Settings, described
from sae.config.settings import RunConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUESTIONS = {
    "Which hooks can I read?": {"guides/model"},
    "What does it cost?": {"guides/model"},
    "How do I use my own model?": {"guides/model"},
    "Can I use it offline?": {"guides/model", "guides/hub"},
    "How many tokens do I need?": {"guides/text"},
    "How do I read a jsonl file?": {"guides/text", "text"},
    "Which architecture should I choose?": {"guides/train", "training"},
    "How do I resume an interrupted training?": {"guides/train"},
    "How do I train several dictionaries at once?": {"guides/sweep", "training"},
    "Is one dictionary better than another?": {"guides/evaluate"},
    "How much memory do I need?": {"guides/model"},
    "What are the standard errors?": {"guides/evaluate", "evaluation", "guides/sweep"},
    "How do I train on a GPU?": {"guides/train"},
    "What is L0?": {"guides/evaluate", "evaluation", "first-hour"},
    "Where are the top activating contexts?": {"guides/inspect"},
    "How do I steer a feature?": {"guides/splice"},
    "How do I ablate a feature?": {"guides/splice"},
    "How do I load a SAELens dictionary?": {"guides/convert"},
    "Which formats can be converted?": {"guides/convert"},
    "How do I publish a dictionary?": {"guides/hub"},
    "Does a latent predict my label?": {"guides/probe"},
    "Which features does a prediction come from?": {"guides/attribute"},
}
"""What newcomers ask, and the pages that answer it."""
BROWSER = """
var document = {getElementById: () => null, addEventListener: () => {}, documentElement: {dataset: {}}};
var window = {addEventListener: () => {}, location: {search: ""}};
var localStorage = {setItem: () => {}, getItem: () => null};
var _ready = () => {};
var SPHINX_HIGHLIGHT_ENABLED = false;
var Documentation = {};
"""
"""What the site's search reads from a browser before it searches."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as by `scripts/docs`."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--builder", "html"]
    built = subprocess.run([*command, str(DOCS), str(folder)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def search(site: Path) -> Iterator[MiniRacer]:
    """The site's own search, in a JavaScript engine."""
    with contextlib.closing(MiniRacer()) as engine:
        engine.eval(BROWSER)
        for name in ("_static/language_data.js", "_static/searchtools.js", "searchindex.js"):
            engine.eval((site / name).read_text(encoding="utf-8"))
        yield engine


def text_of(page: Path) -> str:
    """The words of a page without their markup and with plain quotes, a space between any two."""
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8")))
    return " ".join(text.translate(str.maketrans("‘’“”", "''\"\"")).split())


def hits(search: MiniRacer, question: str) -> list[str]:
    """The pages that a search finds, best first, each once."""
    query = f"Search._parseQuery({json.dumps(question)})"
    found = search.eval(f"JSON.stringify(Search._performSearch(...{query}).map(hit => hit[0]).reverse())")
    return list(dict.fromkeys(json.loads(str(found))))


@pytest.mark.slow
@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_are_answered_in_the_first_three_hits(search: MiniRacer, question: str) -> None:
    assert QUESTIONS[question] & set(hits(search, question)[:3]), hits(search, question)[:8]


@pytest.mark.slow
def test_nonsense_is_not_found(search: MiniRacer) -> None:
    assert hits(search, "quetzalcoatl brachiosaurus") == []


@pytest.mark.slow
def test_links_and_anchors_of_the_site_resolve(site: Path) -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    checked = 0
    for path, text in pages.items():
        for link in re.findall(r'<a\b[^>]*\bhref="([^"]+)"', text):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.is_file(), f"{path.name}: {link}"
            assert not anchor or target.suffix != ".html" or anchor in anchors[target], f"{path.name}: {link}"
            checked += 1
    assert checked > 1000


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]+)"')
    assert not [match for path in site.rglob("*.html") for match in loaded.findall(path.read_text(encoding="utf-8"))]
    style = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not [text for text in style if re.search(r"url\(['\"]?(https?:)?//", text)]


@pytest.mark.slow
def test_settings_and_help_are_those_of_the_package(site: Path) -> None:
    settings = text_of(site / "reference" / "settings.html")
    commands = text_of(site / "reference" / "commands.html")
    for key, _, description in described(RunConfig):
        assert f" {key} " in settings, key
        assert "".join(description.replace("`", "").split()) in settings.replace(" ", ""), key
    for command in cli.commands.values():
        assert " ".join((command.help or "?").split("\n\n")[0].split()) in commands, command.name
        for option in command.params:
            assert not isinstance(option, click.Option) or str(option.help).split(".")[0] in commands, option.name
    assert "Settings, in CONFIG" not in commands


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\.\. auto\w+:: ([\w.]+)", page, re.MULTILINE))
    missing = {name for name in sae.__all__ if f"sae.{name}" not in listed | {"sae.SparseAutoencoder", "sae.SaeError"}}
    assert not missing
    assert "sae.errors.SaeError" in listed
    assert "`sae.SparseAutoencoder` is another name of `sae.Dictionary`" in " ".join(page.split())


def test_every_name_of_the_reference_is_available_after_one_import() -> None:
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    names = [name for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", page, re.MULTILINE) if ".runs." not in name]
    assert len(names) > 60
    script = f"import sae, functools\nfor name in {names}: functools.reduce(getattr, name.split('.')[1:], sae)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_and_group_of_settings_is_in_the_reference() -> None:
    commands = re.findall(
        r"```\{command-help\} (\w+)", (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    )
    groups = re.findall(r"```\{settings\} (\w+)", (DOCS / "reference" / "settings.md").read_text(encoding="utf-8"))
    kinds = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    assert sorted(commands) == sorted(cli.commands)
    assert groups == [name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Settings)]


@pytest.mark.slow
def test_pages_are_as_wide_as_the_window(site: Path, browser: Any) -> None:
    """Code and tables scroll in their place; the list of a page's sections leaves room, or goes."""
    page, too_wide = browser.new_page(), []
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        for width in (400, 900, 1200, 1320, 1600):
            page.set_viewport_size({"width": width, "height": 800})
            if page.evaluate("document.documentElement.scrollWidth") > width:
                too_wide.append((path.relative_to(site).as_posix(), width))
    page.close()
    assert too_wide == []
