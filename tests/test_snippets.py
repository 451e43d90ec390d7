"""The snippets of the documents run: commands in a shell, Python in one namespace per page, YAML as settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import sae
from sae.config.file import parse_config
from sae.dictionary.model_identity import DEMO_FOLDER
from tests.conftest import write_text_folder

ROOT = Path(__file__).parents[1]
SNIPPET = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = {
    "data": {"tokens": 30_000, "held_out_tokens": 4000},
    "dictionary": {"d_sae": 1024},
    "train": {"tokens": 200_000, "dead_after_tokens": 20_000},
    "features": {"tokens": 20_000},
}
"""Settings of `quickstart.yaml` in the workplace, which comes before the configuration of that name."""
WITH_OUTPUT = {"docs/guides/model.md"}
"""Pages that show lines of what the command before them prints."""
WRITTEN = {
    "docs/guides/train.md": {"runs/my-dictionary": 512, "runs/jumprelu": 1024},
    "docs/guides/evaluate.md": {"runs/other": 512},
    "docs/coming-from-saelens.md": {"runs/saved": 1024},
    "docs/guides/convert.md": {"exported": 1024, "exported-again": 1024, "imported": 1024},
}
"""Dictionaries that the snippets of a page leave behind, and their widths."""
OTHER_PACKAGES = ("# SAELens", "# circuit-tracer")
"""How blocks of Python begin that need a package that is not installed here."""
OWN_TEST = {"docs/representations.md", "docs/guides/hub.md"}
"""Pages whose snippets other tests run: with their outputs, or with a hub."""
NOT_RUN = {
    "scripts/quickstart": "runs the configuration of the `workplace` fixture, at its full size",
    "scripts/test": "runs this test",
    "sae superposition": "takes eight minutes; tests/superposition runs every experiment at a smaller size",
    "sae superposition geometry phases-2-1 --seed 1 --out runs/seed-1": "takes two minutes; likewise",
    "sae effects runs/quickstart --features 0": "takes minutes; docs/guides/inspect.md runs it on four features",
    "sae effects runs/quickstart --scale 2": "takes minutes; tests/effects",
    "sae effects runs/quickstart": "takes minutes; likewise",
    "sae probe runs/quickstart sae-probes": "needs that package's data sets; tests/probing has a small copy",
    "sae probe runs/quickstart first-letters": "takes minutes; tests/probing",
    "sae probe runs/smol0 sae-probes examples=200 max_tokens=64": "needs SmolLM2 and those data sets",
    "sae probe runs/smol0 first-letters letters.words=150": "needs SmolLM2",
    "scripts/conformance": "installs other packages",
    "scripts/conformance --only core": "installs other packages",
    "scripts/conformance --tests SAEBENCH/tests/unit": "installs other packages",
}
"""Commands that are not run here, and why. Every other line of every `sh` block is."""


def snippets(page: str) -> list[tuple[str, str]]:
    """The language and the text of every block of a page."""
    return SNIPPET.findall((ROOT / page).read_text(encoding="utf-8"))


def commands(script: str) -> list[str]:
    """The commands of a script, without comments; lines that end in a backslash are joined."""
    lines = [re.sub(r"\s+# .*", "", line).strip() for line in script.replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s+", " ", line) for line in lines if line and not line.startswith("#")]


PAGES = [
    page
    for page in ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
    if page not in OWN_TEST and {language for language, _ in snippets(page)} & {"sh", "python", "yaml", "json"}
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small `quickstart.yaml`, `runs/quickstart`, texts, labels and a model folder."""
    folder = tmp_path_factory.mktemp("snippets")
    path = folder / "quickstart.yaml"
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    small = {key: {**settings.get(key, {}), **values} for key, values in SMALL.items()}
    path.write_text(yaml.safe_dump({**settings, **small}), encoding="utf-8")
    sae.run(sae.load_config(path, [f"out={folder / 'runs' / 'quickstart'}"]))
    write_text_folder(folder / "texts")
    write_text_folder(folder / "path" / "to" / "texts", documents=150)
    shutil.copytree(DEMO_FOLDER, folder / "path" / "to" / "model")
    rows = [f'"{word} = {number}",{word}' for number in range(60) for word in ("letters", "numbers")]
    sides = {"with": "import", "without": "return"}
    for name, word in sides.items():
        lines = [f"{word} value_{number} # {name}" for number in range(60)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "code.txt").write_text(
        "\n".join(f"import module_{n} as m{n}" for n in range(60)) + "\n", encoding="utf-8"
    )
    (folder / "labelled.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "workplace"
    shutil.copytree(workplace, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("COLUMNS", "110")
    names: dict[str, object] = {}
    printed = ""
    for language, text in snippets(page):
        if language == "sh":
            printed = ""
            for command in commands(text):
                if command not in NOT_RUN:
                    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
                    assert done.returncode == 0, f"{page}: {command}\n{done.stdout}\n{done.stderr}"
                    printed += done.stdout
        elif language == "text" and page in WITH_OUTPUT:
            assert {line.rstrip() for line in text.splitlines()} <= {line.rstrip() for line in printed.splitlines()}
        elif language == "python" and not text.startswith(OTHER_PACKAGES):
            with torch.random.fork_rng():
                exec(compile(text, f"{page}: {text.splitlines()[0]}", "exec"), names)
        elif language == "yaml":
            parse_config(yaml.safe_load(text))
        elif language == "json":
            json.loads(text)
    for folder, d_sae in WRITTEN.get(page, {}).items():
        assert sae.load(folder).d_sae == d_sae


def test_commands_that_are_not_run_are_in_the_documents() -> None:
    written = {
        command for page in PAGES for language, text in snippets(page) if language == "sh" for command in commands(text)
    }
    assert set(NOT_RUN) <= written
    assert len(written - set(NOT_RUN)) >= 15


def test_what_a_snippet_is() -> None:
    assert commands("sae a  # why\nsae b \\\n    c=1\n# no\n") == ["sae a", "sae b c=1"]
    assert [language for language, _ in SNIPPET.findall("```sh\nx\n```\n\n```{toctree}\ny\n```\n")] == [
        "sh",
        "{toctree}",
    ]
