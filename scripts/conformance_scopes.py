"""Whether published dictionaries load by name to the same ones here and in SAELens, from one hub on this machine.

    python scripts/conformance_scopes.py [--real-sizes] [--environments FOLDER]

Files with seeded random weights, under the names and keys with which Gemma Scope, Gemma Scope 2, Llama Scope,
Qwen-Scope and two releases for GPT-2 are published, lie in repositories of a loopback hub. SAELens, in an environment
of its own, downloads each with `SAE.from_pretrained(release, id)`, and this toolkit with `sae.load("release/id")`.

Ours are compared with SAELens's and with the authors' formulas, as in scripts/conformance_formats.py: reconstructions
and features at most 1e-9 apart in float64 and 1e-5 in float32, the same features fire, and hook points and the model
are the same. Where SAELens differs from the authors' formula, the formula decides, and the table says how far SAELens
is from it. Sizes are small, and SAELens's loaders are told those that they take for granted; with --real-sizes they
are as published, in float32, for one of each kind of files, which needs 8 GiB of memory. Exits with 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from conformance_formats import AT_EDGE, ENVIRONMENTS, TOLERANCE, compare, dtype_name, loaded, run_peer, version_of
from conformance_scopes_files import Case, Files, cases, inputs, weights
from torch import Tensor

import sae

if TYPE_CHECKING:
    from loopback_hub import LoopbackHub  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
PEER = Path(__file__).with_name("conformance_scopes_peer.py")
ROWS = 100


@dataclass
class Row:
    """A line of the table: a dictionary, and what is wrong with it."""

    case: Case
    dtype: torch.dtype
    fires: float
    distances: tuple[float, float]
    differing: tuple[int, int]
    at_edge: int
    failures: list[str]

    def __str__(self) -> str:
        verdict = f"equal to the formula; SAELens {self.case.differs}" if self.case.differs else "equal"
        verdict = f"FAILED: {'; '.join(self.failures)}" if self.failures else verdict
        features = " and ".join(map(str, self.differing))
        features += f", {self.at_edge} within {AT_EDGE:.0e}" if self.at_edge else ""
        cells = [self.case.ours, dtype_name(self.dtype), f"{self.fires:.1f}"]
        cells += [*(f"{distance:.1e}" for distance in self.distances), features, verdict]
        return f"| {' | '.join(cells)} |"


HEAD = """\
| dictionary | dtype | features per row | distance from SAELens | from the formula | features that differ | verdict |
|---|---|--:|--:|--:|---|---|"""


def check(case: Case, seed: int, x: Tensor, real: bool, theirs: dict[str, Any]) -> Row:
    """Load a dictionary by its name and compare it with SAELens and with its authors' formula."""
    dictionary, scale = sae.load(case.ours), case.scale(x.shape[-1])
    x = x / scale
    saelens = (theirs["strengths"] / scale, theirs["reconstruction"] / scale)
    formula = case.formula(case, weights(case, x.dtype, real, seed), x)
    failures = [f"read as {dictionary.dtype}"] if dictionary.dtype != x.dtype else []
    compared = [compare(dictionary, x, *outputs) for outputs in (saelens, formula)]
    for name, (distance, differing, _) in zip(("SAELens", "the formula"), compared, strict=True):
        if name == "SAELens" and case.differs:
            if distance <= TOLERANCE[x.dtype]:
                failures.append("SAELens is expected to differ, and does not: docs/conformance.md is out of date")
            continue
        failures += [] if distance <= TOLERANCE[x.dtype] else [f"off {name} by {distance:.1e}"]
        failures += [f"{differing} features differ from {name}"] if differing else []
    failures += origin_failures(case, dictionary, theirs)
    distances, differing, edges = zip(*compared, strict=True)
    return Row(case, x.dtype, float((formula[0] != 0).sum() / len(x)), distances, differing, max(edges), failures)


def origin_failures(case: Case, dictionary: sae.Dictionary, theirs: dict[str, Any]) -> list[str]:
    """What is wrong with hook points and model."""
    origin = dictionary.origin
    hooks = tuple(site for site in (origin.reads.hook, origin.gives.hook) if site is not None)
    hooks = hooks[:1] if len(set(hooks)) == 1 else hooks
    model = origin.models.get("", {}).get("name")
    failures = [f"hook points {hooks}"] if hooks != case.hooks else []
    failures += [f"model {model}"] if model != case.model else []
    # SAELens has a name of its own for what a transcoder of Gemma Scope 2 reads
    named = tuple(hook.replace("hook_mlp_in", "mlp.hook_in") for hook in theirs["hooks"])
    if named != (case.hooks or ("hook_embed",)):
        failures.append(f"hook points {theirs['hooks']} in SAELens")
    if not str(theirs["model"]).endswith(case.model.rpartition("/")[2].replace("gpt2", "gpt2-small")):
        failures.append(f"model {theirs['model']} in SAELens")
    return failures


def run(hub: LoopbackHub, interpreter: Path, dtype: torch.dtype, real: bool, folder: Path) -> list[Row]:
    """Fill the hub, have SAELens load and use everything, and compare."""
    files, chosen = dict[str, Files](), list(enumerate(cases()))
    if real:  # one of each kind of files
        chosen = list({case.write: (seed, case) for seed, case in reversed(chosen)}.values())[::-1]
    for seed, case in chosen:
        files.setdefault(case.repository, {}).update(write_case(folder / f"{seed:02}", case, seed, dtype, real))
    for repository, content in files.items():
        hub.add("models", repository, content)
    run_peer(interpreter, PEER, str(folder), environment=hub.environment(folder / "saelens"))
    places = {seed: folder / f"{seed:02}" for seed, _ in chosen}
    return [
        check(case, seed, loaded(places[seed] / "inputs.pt"), real, loaded(places[seed] / "outputs.pt"))
        for seed, case in chosen
    ]


def write_case(folder: Path, case: Case, seed: int, dtype: torch.dtype, real: bool) -> Files:
    """What SAELens's side needs to know of a dictionary; its files."""
    w = weights(case, dtype, real, seed)
    given = {"d_in": w["W_enc"].shape[0], "d_sae": w["W_enc"].shape[1], "d_out": w["W_dec"].shape[1]}
    sizes = {} if real else {name: given[name] for name in case.told}
    facts = {"release": case.release, "id": case.id, "sizes": sizes, "dtype": dtype_name(dtype)}
    folder.mkdir(parents=True)
    (folder / "case.json").write_text(json.dumps(facts), encoding="utf-8")
    torch.save(inputs(case, w, ROWS, seed), folder / "inputs.pt")
    return case.write(case, w)


def main() -> None:
    sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
    from loopback_hub import loopback_hub  # pyright: ignore[reportMissingImports]
    from peers.environments import python  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real-sizes", action="store_true", help="d_in and d_sae as published, in float32")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where SAELens's is, or is made")
    arguments = parser.parse_args()
    interpreter = python("saelens", arguments.environments)
    dtypes = [torch.float32] if arguments.real_sizes else list(TOLERANCE)
    with tempfile.TemporaryDirectory() as work, loopback_hub() as hub:
        os.environ.update(hub.environment(Path(work, "ours")))  # read when the hub's library is imported
        rows = [
            row
            for dtype in dtypes
            for row in run(hub, interpreter, dtype, arguments.real_sizes, Path(work, dtype_name(dtype)))
        ]
    failures = sum(bool(row.failures) for row in rows)
    print(f"sae-lens {version_of(interpreter, 'sae-lens')}\n")
    print("\n".join([HEAD, *map(str, rows)]), f"\n\n{len(rows) - failures} of {len(rows)} passed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
