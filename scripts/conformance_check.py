"""Runs SAEBench's and sae-probes' own code on this package's dictionaries and prints what passed.

    python conformance_check.py FOLDER [--only custom | core | probes | converted]
    python conformance_check.py FOLDER --tests SAEBENCH/tests/unit

Runs in the environment that scripts/conformance makes, on what scripts/conformance_prepare.py wrote to FOLDER. The
dictionaries are as `sae.load` gives them; of their `cfg` only `model_name` is set, to a name transformer-lens 3 knows.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import conformance_converted as converted
import conformance_core as core
import conformance_probes as probes

MODEL = "gpt2"
GROUPS = ("custom", "core", "probes", "converted")
LIBRARIES = ("sae-bench", "sae-probes", "sae-lens", "transformer-lens", "transformers", "datasets", "torch", "numpy")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    of: str
    outcome: str
    passed: bool

    def __str__(self) -> str:
        return f"| {'passed' if self.passed else 'FAILED'} | {self.check} | {self.of} | {self.outcome} |"


def attempt(check: str, of: str, run: Callable[[], str]) -> Row:
    """Run one check; whatever it raises is its outcome."""
    try:
        return Row(check, of, run(), True)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Row(check, of, reason, False)


def each(check: str, dictionaries: dict[str, Any], run: Callable[[str, Any], str]) -> list[Row]:
    """The same check of every dictionary, given its name and itself."""
    return [attempt(check, name, lambda n=name, d=d: run(n, d)) for name, d in dictionaries.items()]


def check_custom_sae(dictionary: Any) -> str:
    """What SAEBench tells authors of custom SAEs to run: decoder norms, and encode, decode and forward on a model."""
    import torch
    from sae_bench.custom_saes.base_sae import BaseSAE  # pyright: ignore[reportMissingImports]

    for dtype in (torch.float32, torch.bfloat16):
        moved = copy.deepcopy(dictionary).to(dtype=dtype)
        assert BaseSAE.check_decoder_norms(moved), f"{dtype}: decoder rows are not of norm 1"
        BaseSAE.test_sae(moved, MODEL)
    return "float32, bfloat16"


# Fixtures of SAEBench's tests, with each dictionary of ours in the place of a SAELens SAE from the hub.
CONFTEST = """
import pytest, sae
from transformer_lens import HookedTransformer

@pytest.fixture
def gpt2_model():
    return HookedTransformer.from_pretrained("gpt2", device="cpu")

@pytest.fixture(params={names!r})
def gpt2_l4_sae(request):
    dictionary = sae.load("sweep/" + request.param)
    dictionary.cfg.model_name = "gpt2"
    return dictionary
"""


def saebench_tests(folder: Path, names: list[str]) -> list[Row]:
    """SAEBench's own unit tests, a row for each, on every dictionary."""
    own = Path("results/saebench-tests")
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("conftest.py", "__pycache__"))
    (own / "conftest.py").write_text(CONFTEST.format(names=names), encoding="utf-8")
    (own / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # or it would find this project's
    report = own / "junit.xml"
    options = ["-q", "--continue-on-collection-errors", "--import-mode=importlib", f"-c={own / 'pytest.ini'}"]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", str(own)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if not report.is_file():
        return [Row("SAEBench's unit tests", str(folder), run.stdout[-200:] + run.stderr[-200:], False)]
    outcomes: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((found for tag in ("failure", "error", "skipped") if (found := case.find(tag)) is not None), None)
        message = "" if bad is None else f"{bad.tag}: {bad.get('message')}"
        name, _, parameter = (case.get("name") or "").rstrip("]").partition("[")
        test = f"{case.get('classname')}.{name}"
        outcomes.setdefault(test, {})[parameter] = " ".join(message.split())[:200]
    return [
        Row("SAEBench's unit test", test, _outcome(of_each), not any(of_each.values()))
        for test, of_each in outcomes.items()
    ]


def _outcome(of_each: dict[str, str]) -> str:
    failures = "; ".join(f"{name} {message}" for name, message in of_each.items() if message)
    return failures or (f"on each of {len(of_each)} dictionaries" if "" not in of_each else "without a dictionary")


def core_rows(dictionaries: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """SAEBench's core evaluation, and its tables where all of it passed."""
    reports = {name: json.loads(Path("sweep", name, "eval.json").read_text(encoding="utf-8")) for name in dictionaries}
    numbers = {
        "defaults": core.run_core(dictionaries, core.DEFAULTS),
        "special tokens left": core.run_core(dictionaries, core.OURS),
    }
    rows = each("core evaluation", dictionaries, lambda name, d: core.check_core(name, numbers, reports[name], d))
    tables = core.tables(numbers, reports) if all(row.passed for row in rows) else []
    return [*rows, attempt("core, bfloat16", "topk", lambda: core.check_bfloat16(dictionaries["topk"]))], tables


def probe_rows(dictionaries: dict[str, Any]) -> list[Row]:
    """sae-probes, by itself and inside SAEBench."""
    shutil.rmtree(probes.ACTIVATIONS, ignore_errors=True)
    inside = attempt("sae-probes in SAEBench", "topk", lambda: probes.check_probing_evaluation(dictionaries["topk"]))
    return [*each("sae-probes", dictionaries, probes.check_probes), inside]


def converted_rows(dictionaries: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """Dictionaries in other toolkits' files: SAEBench's checks of custom SAEs and its core evaluation."""
    paths = converted.write_all(dictionaries)
    ours = converted.load_all(paths)
    rows = each("custom-SAE checks", ours, lambda _, d: check_custom_sae(d))
    numbers = converted.run_all(dictionaries, ours, paths)
    rows += each("core evaluation", ours, lambda name, _: converted.check_core(name, numbers))
    return rows, converted.tables(numbers) if all(row.passed for row in rows) else []


def run_group(group: str, tests: Path | None) -> tuple[list[Row], list[str]]:
    """A group's rows, and the tables beneath them."""
    import sae

    names = sorted(path.parent.parent.name for path in Path("sweep").glob("*/dictionary/config.json"))
    if tests:
        return saebench_tests(tests, names), []
    dictionaries = {name: sae.load(Path("sweep", name)) for name in names}
    for dictionary in dictionaries.values():
        dictionary.cfg.model_name = MODEL
    if group == "core":
        return core_rows(dictionaries)
    if group == "converted":
        return converted_rows(dictionaries)
    if group == "probes":
        return probe_rows(dictionaries), []
    return each("custom-SAE checks", dictionaries, lambda _, d: check_custom_sae(d)), []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/conformance_prepare.py filled")
    parser.add_argument("--only", choices=GROUPS, help="run this group of checks alone")
    parser.add_argument("--tests", type=Path, help="tests/unit of a checkout of SAEBench, to run these instead")
    arguments = parser.parse_args()
    tests = arguments.tests.resolve() if arguments.tests else None
    if tests and not tests.is_dir():
        parser.error(f"--tests {str(tests)!r} is no folder; give tests/unit of a checkout of SAEBench")
    os.chdir(arguments.folder)
    os.environ |= {"HF_HOME": str(Path("hub").resolve()), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    print(", ".join(f"{name} {version(name)}" for name in LIBRARIES))
    failed = 0
    for group in ["tests"] if tests else [arguments.only] if arguments.only else GROUPS:
        rows, tables = run_group(group, tests)
        text = "\n".join(["| | check | of | outcome |", "|---|---|---|---|", *map(str, rows), "", *tables, ""])
        written = Path(f"conformance-{group}.md")
        written.write_text(text, encoding="utf-8")
        failures = sum(not row.passed for row in rows)
        failed += failures
        print(f"\n{text}\n{group}: {len(rows) - failures} of {len(rows)} passed; written to {written.resolve()}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
