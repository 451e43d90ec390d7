"""Whether SAEDashboard's own code reads what `sae export` writes, and makes the same rows for Neuronpedia of it.

    python scripts/conformance_dashboards.py [RUN] [--environment FOLDER] [--checkout FOLDER]

RUN is a run folder with features; by default runs/quickstart. SAEDashboard (0.8.0) is put into an environment of its
own, which is made once and needs a package index. Its own requirements, among them another PyTorch, are left out: the
classes of its files and its conversion for Neuronpedia need NumPy and orjson alone.

Its classes load every batch and give it back, and its settings take ours. Its conversion for Neuronpedia is newer than
that release: with --checkout, a checkout of jbloomAus/SAEDashboard, it makes Neuronpedia's files of the batches, which
are compared with those that `sae export --to neuronpedia` writes, row by row and column by column. Prints a table, and
exits with 1 if anything in it failed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sae

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / "runs" / "conformance" / "environments" / "saedashboard"
INSTALLED = ("sae-dashboard==0.8.0", "numpy", "orjson")
PEER = """
import json, sys
from pathlib import Path
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig

folder, back = Path(sys.argv[1]), Path(sys.argv[2])
settings = NeuronpediaRunnerConfig(**json.loads((folder / "run_settings.json").read_text()))
for path in sorted(folder.glob("batch-*.json")):
    batch = NeuronpediaDashboardBatch(**json.loads(path.read_text()))
    (back / path.name).write_text(json.dumps(batch.to_dict()))
if len(sys.argv) < 4:
    sys.exit()
from sae_dashboard.neuronpedia.neuronpedia_export import NeuronpediaExportConfig, export_neuronpedia_dashboards
export_neuronpedia_dashboards(NeuronpediaExportConfig(
    saedashboard_output_dir=str(folder), exports_dir=str(back / "neuronpedia"), creator_name="unknown",
    creator_id="x", release_id=settings.np_set_name, release_title="", url="", model_name=settings.model_id,
    neuronpedia_source_set_id=settings.np_set_name, neuronpedia_source_set_description="", hf_weights_repo_id="",
    hf_weights_path="", hook_point="", layer_num=settings.layer, prompts_huggingface_dataset_path="",
    n_prompts_total=settings.n_prompts_total, n_tokens_in_prompt=settings.n_tokens_in_prompt,
))
"""
OTHERS = {"id", "creatorId", "createdAt", "sourceSetName", "hookName", "topkCosSimIndices", "topkCosSimValues"}
"""Columns that are keys or times, or that SAEDashboard leaves empty."""


def interpreter(folder: Path) -> Path:
    """The Python of SAEDashboard's environment, which is made if it is missing."""
    path = folder / "bin" / "python"
    if not (folder / "installed").is_file():
        print("making an environment for SAEDashboard (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [path, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, *INSTALLED], check=True)
        (folder / "installed").touch()
    return path


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table of a bulk import, in the order of the features."""
    return sorted(_rows(folder, table), key=lambda row: int(row["index"]))


def _rows(folder: Path, table: str) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.rglob(f"{table}/*.jsonl.gz")):
        yield from map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """What differs between the rows of two exports; empty if nothing does."""
    if len(ours) != len(theirs):
        return f"{len(ours)} rows here, {len(theirs)} there"
    for one, other in zip(ours, theirs, strict=True):
        for column in one.keys() & other.keys() - OTHERS:
            same = one[column] == other[column]
            if column == "index":  # a number there
                same = int(one[column]) == int(other[column])
            elif column == "maxActApprox":  # the largest in a window there; windows are stored in half precision
                same = math.isclose(one[column], other[column], rel_tol=2**-10)
            if not same:
                return f"{column} of feature {one['index']}: {one[column]!r} here, {other[column]!r} there"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", default=ROOT / "runs" / "quickstart", type=Path, help="a run folder")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="where theirs is, or is made")
    parser.add_argument("--checkout", type=Path, help="of SAEDashboard, whose conversion for Neuronpedia is compared")
    arguments = parser.parse_args()
    python, dictionary = interpreter(arguments.environment), sae.load(arguments.run)
    with tempfile.TemporaryDirectory() as work:
        place, outcomes = Path(work), dict[str, str]()
        settings: dict[str, Any] = {"dictionary": dictionary, "set_name": "res-sae"}
        done = sae.export_features(arguments.run, place / "dashboard", "saedashboard", **settings)
        sae.export_features(arguments.run, place / "neuronpedia", "neuronpedia", **settings)
        (place / "back").mkdir()
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [python, "-c", PEER, place / "dashboard", place / "back"]
        if arguments.checkout is not None:
            command.append("convert")
            environment["PYTHONPATH"] = str(arguments.checkout.resolve())
        peer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        outcomes["its classes and settings load the files"] = peer.stderr.strip()[-500:] if peer.returncode else ""
        if not peer.returncode:
            for path in sorted((place / "dashboard").glob("batch-*.json")):
                same = json.loads(path.read_bytes()) == json.loads((place / "back" / path.name).read_bytes())
                outcomes[f"{path.name} comes back as it was"] = "" if same else "it differs"
            for table in ("features", "activations") if arguments.checkout is not None else ():
                ours, theirs = (rows(folder, table) for folder in (place / "neuronpedia", place / "back"))
                outcomes[f"{len(ours):,} {table} are the same for Neuronpedia"] = compare(ours, theirs)
    print(f"{done.features:,} features of {arguments.run}; {', '.join(INSTALLED)}\n\n| check | outcome |\n|---|---|")
    for check, reason in outcomes.items():
        print(f"| {check} | {f'FAILED: {reason}' if reason else 'passed'} |")
    sys.exit(1 if any(outcomes.values()) else 0)


if __name__ == "__main__":
    main()
