"""An architecture is declared in one place: nothing else in the package knows its name or its class."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sae
from sae.architectures import ARCHITECTURES

ROOT = Path(sae.__file__).parent
LAST = list(ARCHITECTURES)[-1]
CLASSES = {kind.__name__ for kind in ARCHITECTURES.values()}
WORDS = re.compile(rf"\b({'|'.join((*ARCHITECTURES, *CLASSES))})\b")
DECLARED = ("architectures/", "training/objectives/", "config/settings.py", "formats/")
"""Where an architecture is declared: its class, its objective, its name with the settings that it reads. And the
formats of other toolkits, which refuse to write one that those toolkits lack."""
CHOSEN = {
    "__init__.py": "public names",
    "__init__.pyi": "public names",
    "dictionary/hook_points.py": "a language model's MLP can be gated, too",
    "evaluation/baselines.py": "the random baseline fires its k strongest features",
    "evaluation/scoring.py": "the frozen-decoder baseline of a dictionary from elsewhere",
    "superposition/dictionaries.py": "what an experiment trains by default",
}
"""Files that choose an architecture for a purpose; another architecture changes nothing in them."""


def docstrings(tree: ast.AST) -> Iterator[ast.expr]:
    """Strings that stand by themselves."""
    yield from (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))


def mentions(path: Path) -> set[str]:
    """Names and classes of architectures in the code of a file, without docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = set(map(id, docstrings(tree)))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            found.update(WORDS.findall(node.value))
        for name in ("id", "attr", "name"):
            if getattr(node, name, None) in CLASSES:
                found.add(getattr(node, name))
    return found


def test_no_other_file_knows_an_architecture() -> None:
    paths = (path for path in ROOT.rglob("*.py*") if path.suffix in (".py", ".pyi"))  # not what is compiled from them
    found = {path.relative_to(ROOT).as_posix(): mentions(path) for path in paths}
    elsewhere = {path: names for path, names in found.items() if names and not path.startswith(DECLARED)}
    assert elsewhere.keys() == CHOSEN.keys(), elsewhere


@pytest.mark.parametrize(
    "line",
    [
        'if config.architecture == "gated": pass',
        "isinstance(dictionary, sae.Gated)",
        "from sae.architectures.gated import Gated",
        'colours = {"topk": BLUE}',
    ],
)
def test_a_mention_would_be_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "file.py").write_text(f'"""A docstring on relu."""\n{line}\n', encoding="utf-8")
    assert mentions(tmp_path / "file.py") in ({"gated"}, {"Gated"}, {"topk"})


ARCHITECTURE = '''"""Leaky: another architecture, for this test: TopK whose decoder is free."""

from __future__ import annotations

from sae.architectures.topk import TopK


class Leaky(TopK):
    """As TopK."""

    architecture = "leaky"
    unit_decoder = False
    reads = ("train.k_aux",)
'''
OBJECTIVE = '''

@objective_of(Leaky)
def leaky_loss(
    dictionary: Leaky, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_in"], context: StepInputs
) -> Losses:
    """As TopK's."""
    return topk_loss(dictionary, x, target, context)
'''
USE = """
import torch, sae
from sae.config.file import load_config
from sae.errors import ConfigError
from sae.evaluation.pareto import ARCHITECTURE_COLOURS

assert sae.__file__.startswith({root!r}), sae.__file__
source = sae.IterableSource([torch.randn(32, 8) for _ in range(4)])
config = sae.DictionaryConfig(architecture="leaky", d_sae=16, k=2)
made = sae.train(source, config, sae.TrainConfig(tokens=320))
made.save("leaky")
loaded = sae.load("leaky")
assert type(loaded).__name__ == "Leaky" and torch.equal(loaded(torch.ones(3, 8)), made(torch.ones(3, 8)))
assert (loaded.encode(torch.randn(5, 8)) > 0).sum(1).max() <= 2
for settings, message in (
    ({{"encoder_dtype": "bfloat16"}}, "has no effect on leaky, only on topk, batch_topk, matryoshka"),
    ({{"l1_coefficient": 1.0}}, "has no effect on leaky, only on relu, gated"),
):
    try:
        sae.train(source, config, sae.TrainConfig(tokens=320, **settings))
    except ConfigError as error:
        assert message in str(error), error
    else:
        raise AssertionError(settings)
try:
    load_config(None, ["dictionary.architecture=leeky"])
except ConfigError as error:
    assert str(error).endswith("{last!r} or 'leaky'"), error
assert len(set(ARCHITECTURE_COLOURS.values())) == len(ARCHITECTURE_COLOURS) == {count} + 1
"""


def test_another_architecture_takes_three_files(tmp_path: Path) -> None:
    copy = tmp_path / "sae"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    (copy / "architectures" / "leaky.py").write_text(ARCHITECTURE, encoding="utf-8")
    for name, before, after in (
        ("config/settings.py", f'"{LAST}"]', f'"{LAST}", "leaky"]'),
        (
            "training/objectives/selected.py",
            "from sae.architectures.elementwise import OneThreshold\n",
            "from sae.architectures.elementwise import OneThreshold\nfrom sae.architectures.leaky import Leaky\n",
        ),
    ):
        text = (copy / name).read_text(encoding="utf-8")
        assert text.count(before) == 1
        (copy / name).write_text(text.replace(before, after), encoding="utf-8")
    with (copy / "training/objectives/selected.py").open("a", encoding="utf-8") as file:
        file.write(OBJECTIVE)
    code = USE.format(root=str(tmp_path), last=LAST, count=len(ARCHITECTURES))
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
