"""The package as a whole: public names, the direction of imports, what a bare training machine needs."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from structure import structure_of, tree

import sae

ROOT = Path(sae.__file__).parent
STRUCTURE = structure_of(ROOT.parent)

# Rooms by their floors; a file may import its own room and those on lower floors.
FLOW = [
    ["errors", "numerics"],
    ["files", "kernels"],
    ["config", "dictionary", "results"],
    ["architectures", "console", "hub", "model", "text"],
    ["activations", "formats", "training"],
    ["evaluation", "features", "probing"],
    ["effects", "runs", "superposition"],
    ["viewer"],
    ["cli"],
    ["__main__"],
]
CORE = {
    "activations",
    "architectures",
    "config",
    "dictionary",
    "errors",
    "files",
    "formats",
    "hub",
    "kernels",
    "numerics",
    "text",
    "training",
}
CORE_LIBRARIES = {"torch", "einops", "safetensors", "numpy", "pydantic", "pydantic_core", "yaml", "jaxtyping", "sae"}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Absolute imports of a file, and whether each stands at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, id(node) in top))
    return found


def modules() -> list[tuple[str, Path]]:
    names = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append((".".join(part for part in parts if part != "__init__"), path))
    return [(name, path) for name, path in names if name]


def test_every_room_imports_lower_floors_only() -> None:
    floors = {f"sae.{room}": number for number, rooms in enumerate(FLOW) for room in rooms}
    rooms = {room: targets for room, targets in STRUCTURE.rooms.items() if room.startswith("sae.")}
    assert set(rooms) == set(floors)
    wrong = [
        f"{room} imports {target}"
        for room, targets in rooms.items()
        for target in targets
        if target == "sae" or floors[target] >= floors[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_contributors_read_the_same_floors() -> None:
    shown = "\n".join(f"    {number:2}  {', '.join(rooms)}" for number, rooms in enumerate(FLOW, 1))
    assert shown in (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_tree_in_the_documents_is_that_of_the_files() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert tree(ROOT.parent) in page, "copy the output of scripts/structure.py --tree into docs/architecture.md"


def test_no_files_import_each_other() -> None:
    assert STRUCTURE.circles() == []


@pytest.mark.parametrize(
    ("what", "places"),
    [
        ("import matplotlib|from matplotlib", {"results/figure.py"}),
        (r"[\"']:--[\"'| ]", {"results/markdown.py"}),
        (r"rich\.table import Table\b(?! as Grid)", {"results/table.py"}),
        ('"format_version"|format_version =', {"files/formats.py"}),
        (r"ConfigDict\([^)]*frozen=True", {"config/base.py"}),
        (r"Callable\[\[(str, )?int, int\], None\]", {"config/progress.py"}),
        (r'blocks\\\.|f"blocks\.', {"dictionary/hook_points.py"}),
        (r"get_close_matches\(parts", {"config/base.py"}),
        (r"sha256\(json\.dumps\([^)]*sort_keys=True", {"files/formats.py"}),
        (r"\b(result_head|version_of)\(", {"files/formats.py", "files/kept.py"}),
        (r"\.head\(", {"dictionary/base.py", "files/formats.py", "files/kept.py"}),
        (
            r"(FORMAT|\.format)\.check\(",
            {"activations/manifest.py", "dictionary/saved.py", "effects/effects.py", "files/kept.py"},
        ),
        (
            r"\bwrite_json\(",
            {"dictionary/base.py", "files/writing.py", "files/kept.py", "formats/foreign_files.py"},
        ),
    ],
)  # fmt: skip
def test_each_is_written_once(what: str, places: set[str]) -> None:
    """A second figure, table, format, kept result, base of settings, progress or grammar of hooks would be found."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if re.search(what, path.read_text(encoding="utf-8"))
    }
    assert found == places


def test_the_house_stays_small() -> None:
    assert len(STRUCTURE.rooms) <= 27
    ways_out = "import from a room that yours imports already, or move the code to a room that does"
    assert STRUCTURE.imports <= 160, f"{STRUCTURE.imports} imports between rooms: {ways_out}"
    entries = [path.name for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 28, sorted(entries)


@pytest.mark.parametrize("folder", ["sae", "tests", "scripts", "benchmarks"])
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    lengths = {
        path.relative_to(ROOT.parent).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT.parent / folder).rglob("*")
        if path.suffix in (".py", ".pyi", ".js", ".css", ".html", "")
        and path.is_file()
        and "environments" not in path.parts  # other toolkits, installed for comparisons
    }
    assert len(lengths) > 10
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def test_the_training_core_needs_few_libraries() -> None:
    allowed = CORE_LIBRARIES | set(sys.stdlib_module_names)
    compiled = {name for name, _ in modules() if name.startswith(("kernels.triton", "kernels.numba"))}
    wrong = [
        f"sae.{name} imports {target}"
        for name, path in modules()
        if name.split(".")[0] in CORE
        for target, at_top in imports(path)
        if at_top and target.split(".")[0] not in allowed | ({name.split(".")[1]} if name in compiled else set())
    ]
    assert not wrong, "\n".join(wrong)


def test_training_runs_where_the_language_model_libraries_are_missing() -> None:
    code = """
import sys
for name in ("transformer_lens", "transformers", "datasets", "wandb", "matplotlib", "pyarrow", "rich"):
    sys.modules[name] = None
import torch, sae
from sae.config.settings import TrainConfig, DictionaryConfig
source = sae.IterableSource([torch.randn(32, 8) for _ in range(4)])
d = sae.train(source, DictionaryConfig(d_sae=16, k=2), TrainConfig(tokens=320))
assert d(torch.randn(3, 8)).shape == (3, 8)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_importing_the_package_is_quick() -> None:
    """Less than a second after torch; and nothing heavy comes along."""
    code = """
import time, torch
start = time.process_time()
import sae
sae.load, sae.train, sae.ActivationCache
elapsed = time.process_time() - start
import sys
heavy = {"transformer_lens", "transformers", "datasets", "wandb", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
print(elapsed)
"""
    times = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 1.0, times


def test_the_command_line_begins_without_torch() -> None:
    code = """
import sys
from sae import __main__
from sae.cli import main
heavy = {"torch", "numpy", "safetensors", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    for words in (["--version"], ["--help"], ["run", "--help"]):
        command = [sys.executable, "-X", "importtime", "-m", "sae", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "click" in imported and not {"torch", "numpy"} & imported, words
        assert done.stdout.startswith(f"sae, version {sae.__version__}" if words == ["--version"] else "Usage:"), words


def test_the_installed_command_is_the_guarded_one() -> None:
    assert 'sae = "sae.__main__:main"' in (ROOT.parent / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["click", "pydantic", "sae.cli.main"])
def test_ctrl_c_while_modules_are_imported_leaves_one_line(module: str) -> None:
    """The signal comes as a module is looked for, which would otherwise end in a stack trace."""
    code = f"""
import os, signal, sys
class Pressing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressing())
from sae.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert done.stderr == "interrupted before any work started\n"


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    code = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["sae", "--version"]
from sae.__main__ import main
main()
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "version" in done.stdout


def test_public_names_exist_and_are_documented() -> None:
    assert sae.__all__ == sorted(sae.__all__)
    for name in sae.__all__:
        assert getattr(sae, name).__doc__, name
    assert set(sae.__all__) <= set(dir(sae))


def public_names(file: Path) -> set[str]:
    """What `__all__` of a package lists."""
    name = ".".join(file.parent.relative_to(ROOT.parent).parts)
    return set() if name == "sae.kernels.triton" else set(getattr(importlib.import_module(name), "__all__", ()))


def test_no_public_name_is_a_submodule_too() -> None:
    """Importing the submodule would replace the function or class by a module: `sae.sweep(…)` worked once."""
    for file in [ROOT / "__init__.py", *(path for _, path in modules() if path.name == "__init__.py")]:
        submodules = {
            path.stem for path in file.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
        }
        assert not public_names(file) & submodules, file
    code = """
import importlib, pkgutil, sae
for module in pkgutil.walk_packages(sae.__path__, "sae."):
    if "kernels.triton" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in sae.__all__:
    assert callable(getattr(sae, name)), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_submodules_are_there_without_being_imported() -> None:
    code = """
import sae
print(sae.superposition.run.__module__, sae.probing.ProbeConfig.__name__, sae.errors.SaeError.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["sae.superposition.runner", "ProbeConfig", "SaeError"]


def test_what_editors_see_is_what_there_is() -> None:
    tree = ast.parse((ROOT / "__init__.pyi").read_text(encoding="utf-8"))
    shown = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module not in ("sae", "typing", "__future__")
    }
    assert shown == sae._HOME
    assert sorted({*shown} - {"__version__"}) == sae.__all__
    assert (ROOT / "py.typed").is_file(), "without this file type checkers do not look into an installed package"


@pytest.mark.slow
def test_a_type_checker_knows_every_public_name(tmp_path: Path) -> None:
    """Its type, and what is no name or is called wrongly."""
    lines = [f"reveal_type(sae.{name})" for name in sae.__all__]
    wrong = ["sae.lode", "sae.train(1)", "sae.DictionaryConfig(d_sae='many')"]
    (tmp_path / "notebook.py").write_text("\n".join(["import sae", *lines, *wrong, "sae.superposition.run"]))
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(ROOT.parent)], "typeCheckingMode": "standard"})
    )
    checker = Path(sys.executable).with_name("basedpyright")
    command = [checker, "--pythonpath", sys.executable, "--outputjson", "notebook.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    types = {one["range"]["start"]["line"]: one["message"] for one in found if one["severity"] == "information"}
    for number, name in enumerate(sae.__all__, 1):
        of_name = types[number].partition(" is ")[2].strip('"')
        assert of_name not in ("Any", "Unknown") and "Unknown" not in of_name, f"{name}: {of_name}"
        assert of_name.startswith("type[" if name[0].isupper() else "("), f"{name}: {of_name}"
    errors = [one["range"]["start"]["line"] - len(lines) for one in found if one["severity"] == "error"]
    assert errors == [1, 2, 3], done.stdout


def test_an_unknown_name_lists_the_known_ones() -> None:
    try:
        sae.lode  # noqa: B018
    except AttributeError as error:
        assert "load" in str(error)
    else:
        raise AssertionError("sae.lode exists")
