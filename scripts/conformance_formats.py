"""Whether dictionaries of other packages are the same here, and ours the same there, by those packages' own code.

    python scripts/conformance_formats.py [--only PACKAGE …] [--environments FOLDER] [--python PATH]

The packages are SAELens, sparsify and dictionary_learning, each in an environment of its own, which is made once, in
runs/conformance/environments, and needs a package index. Each package saves random dictionaries of all its
architectures with its own code, in float64 and float32, with decoder rows of norm 1 and of other norms. They are read
here and written back, and dictionaries of our own architectures are written too. The package then loads what we wrote
with its own code. circuit-tracer and OpenAI's sparse_autoencoder are on no package index: those that the environment of
the Python at PATH has are compared too, and circuit-tracer makes attribution graphs with our transcoders
(conformance_attribution.py).

Compared are reconstructions and what each feature contributes to them (activation × norm of the decoder row), by the
largest distance in a row relative to the norm of its reconstruction: at most 1e-9 in float64 and 1e-5 in float32. The
same features must fire, except where a pre-activation is within 1e-6 of the bound it must exceed. If nothing was folded
when a dictionary was read, its tensors must come back to the last bit. What cannot be used here must be refused in one
line that names it. Prints a table, and exits with 1 if anything in it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conformance_attribution import set_rows
from torch import Tensor

import sae
from sae.architectures import ARCHITECTURES, LOADED, MatchingPursuit, TopK
from sae.dictionary.base import Dictionary
from sae.dictionary.frame import PLAIN, Frame
from sae.errors import FormatError
from sae.formats import WRITERS
from sae.formats.foreign import CONVERTED

PEER = Path(__file__).with_name("conformance_formats_peer.py")
REPOSITORIES = Path(__file__).with_name("conformance_formats_repositories.py")
ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "runs" / "conformance" / "environments"
PACKAGES = ("saelens", "sparsify", "dictionary_learning")
MODULES = {"circuit_tracer": "circuit_tracer", "openai": "sparse_autoencoder"}
"""Packages that are on no index, and what is imported of them."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
AT_EDGE = 1e-6
D_IN, D_SAE, K, ROWS = 12, 48, 5, 100
MODEL = {"model": {"name": "gpt2", "weight_processing": "none"}, "context_length": 128}
ORIGINS: dict[str, dict[str, Any]] = {
    "": {**MODEL, "hook": "blocks.3.hook_resid_post"},
    ", of unknown origin": {},
    ", transcoder": {**MODEL, "hook": "blocks.3.mlp.hook_in", "target_hook": "blocks.3.hook_mlp_out"},
}
TRANSCODERS = {"saelens": {"relu", "jumprelu"}, "sparsify": {"topk"}}
AUTOENCODERS = {
    "saelens": set(ARCHITECTURES), "sparsify": {"topk"}, "dictionary_learning": set(ARCHITECTURES), "openai": {"relu"},
}  # fmt: skip
"""Our architectures that a package's files can hold."""


FRAMES: dict[str, tuple[tuple[str, str, Frame], ...]] = {
    "saelens": (
        ("relu", "", Frame("layer_norm")), ("topk", "", Frame("layer_norm")), ("gated", "", Frame("constant_norm")),
        ("batch_topk", "", Frame("constant_norm")), ("matching_pursuit", "", PLAIN),
        ("matching_pursuit", "", Frame("layer_norm")), ("relu", ", transcoder", Frame(skip=True)),
        ("jumprelu", ", transcoder", Frame(skip=True, d_out=8)), ("relu", ", transcoder", Frame(d_out=8)),
    ),
    "sparsify": (("topk", "", Frame(skip=True)), ("topk", ", transcoder", Frame(skip=True))),
    "openai": (("topk", "", Frame("layer_norm")),),
}  # fmt: skip
"""Our dictionaries that come only from other toolkits, with the origin's key."""


@dataclass
class Row:
    """A line of the table: a dictionary, and what is wrong with it."""

    package: str
    architecture: str
    dtype: str
    distance: dict[str, float] = field(default_factory=dict)
    differing: int = 0
    at_edge: int = 0
    verdict: str = "equal"
    failures: list[str] = field(default_factory=list)

    def compare(self, way: str, dictionary: Dictionary, x: Tensor, theirs: dict[str, Any]) -> None:
        """Compare a dictionary of ours with what the package computed with the equal one."""
        distance, differing, at_edge = compare(dictionary, x, theirs["strengths"], theirs["reconstruction"])
        self.distance[way] = distance
        self.differing, self.at_edge = self.differing + differing, self.at_edge + at_edge
        if not distance <= TOLERANCE[x.dtype]:
            self.failures.append(f"{way}: off by {distance:.1e}")
        if differing:
            self.failures.append(f"{way}: {differing} features differ")

    def __str__(self) -> str:
        distances = [f"{self.distance[way]:.1e}" if way in self.distance else "" for way in ("read", "written")]
        features = str(self.differing) if self.distance else ""
        if self.at_edge:
            features += f", and {self.at_edge} within {AT_EDGE:.0e}"
        verdict = f"FAILED: {'; '.join(self.failures)}" if self.failures else self.verdict
        return f"| {' | '.join([self.package, self.architecture, self.dtype, *distances, features, verdict])} |"


@torch.no_grad()
def compare(dictionary: Dictionary, x: Tensor, strengths: Tensor, reconstruction: Tensor) -> tuple[float, int, int]:
    """The largest distance in a row, how many features fire on one side only, and how many more do at their edge."""
    ours = dictionary.encode(x) * dictionary.W_dec.norm(dim=-1)
    if dictionary.d_sae == 2 * strengths.shape[-1]:
        strengths = torch.cat([strengths.relu(), (-strengths).relu()], dim=-1)
    differ = (ours > 0) != (strengths > 0)
    edges = differ & (edges_of(dictionary, x) | (torch.maximum(ours, strengths) <= AT_EDGE))
    settled, norms = ~edges.any(-1), reconstruction.norm(dim=-1)
    distances = torch.maximum((dictionary(x) - reconstruction).norm(dim=-1), (ours - strengths).norm(dim=-1)) / norms
    assert settled.sum() > 0.9 * len(x) and (strengths > 0).any(), "too little fires, or too near its bounds"
    return float(distances[settled].max()), int((differ & ~edges).sum()), int(edges.sum())


def edges_of(dictionary: Dictionary, x: Tensor) -> Tensor:
    """Where a pre-activation is so near to what it must exceed that rounding decides whether the feature fires."""
    pre = dictionary.pre_activations(x)
    if isinstance(dictionary, MatchingPursuit):
        return torch.zeros_like(pre, dtype=torch.bool)
    if isinstance(dictionary, TopK):
        bounds = pre.topk(dictionary.k + 1).values[:, -2:].mean(-1, keepdim=True)
    else:
        bounds = dictionary.bounds()  # pyright: ignore[reportCallIssue]
    return (pre - bounds).abs() <= AT_EDGE


def read_cases(package: str, folder: Path, back: Path) -> Iterator[Row]:
    """Read what a package saved, compare, and write it back to be used there."""
    for file in sorted(folder.glob("*/*/case.json")):
        case = json.loads(file.read_text(encoding="utf-8"))
        name, dtype = file.parent.name, file.parent.parent.name
        row = Row(package, name, dtype)
        yield row
        path = file.parent / case["path"]
        if case["refused"]:
            row.verdict, row.failures = refusal(path, case["refused"])
            continue
        theirs, x = loaded(file.with_name("outputs.pt")), loaded(file.with_name("inputs.pt"))
        try:
            dictionary = sae.load(path)
        except FormatError as error:
            row.failures.append(str(error))
            continue
        row.compare("read", dictionary, x, theirs)
        origin = {"hook": dictionary.origin.reads.hook, "context_length": dictionary.origin.context_length}
        row.failures += [f"{key} is {origin[key]!r}" for key, value in case["of"].items() if origin[key] != value]
        row.failures += [f"read as {dictionary.dtype}"] if dictionary.dtype != x.dtype else []
        if package in WRITERS:
            write_case(package, dictionary, x, back / dtype / name, path.name)


def refusal(path: Path, expected: str) -> tuple[str, list[str]]:
    """The verdict on a dictionary that must be refused, and what is wrong with that."""
    try:
        dictionary = sae.load(path)
    except FormatError as error:
        message = str(error).replace(repr(str(path)), "…")
        bad = [f"the message does not name {expected}: {message}"] if expected not in message else []
        return f"refused: {message}", bad + (["more than one line"] if "\n" in message else [])
    return "", [f"read as {type(dictionary).__name__}, which is to be refused"]


def our_cases(package: str, folder: Path) -> Iterator[Row]:
    """Write dictionaries of all our architectures that the package's files can hold."""
    for dtype in TOLERANCE:
        for kind, origin in ORIGINS.items():
            held = (TRANSCODERS if "target_hook" in origin else AUTOENCODERS).get(package, set())
            for architecture in (name for name in ARCHITECTURES if name in held):
                yield our_case(package, ours(architecture, origin).to(dtype), f"our {architecture}{kind}", folder)
        for architecture, kind, frame in FRAMES.get(package, ()):
            facts = "".join(f", {key} {value}" for key, value in frame.to_json().items())
            dictionary = ours(architecture, ORIGINS[kind], frame).to(dtype)
            yield our_case(package, dictionary, f"our {architecture}{kind}{facts}", folder)


def our_case(package: str, dictionary: Dictionary, name: str, folder: Path) -> Row:
    """Write a dictionary of ours; its line in the table."""
    x = 2 * torch.randn(ROWS, D_IN, dtype=dictionary.dtype)
    write_case(package, dictionary, x, folder / dtype_name(dictionary.dtype) / name, "layers.3")
    return Row(package, name, dtype_name(dictionary.dtype))


@torch.no_grad()
def ours(architecture: str, origin: dict[str, Any], frame: Frame = PLAIN) -> Dictionary:
    """A dictionary of ours with random weights in float64, its decoder rows of norm 1."""
    cls, given = LOADED[architecture], {"k": K, "prefixes": (0.25, 1.0)}
    settings = {name: given[name] for name in cls.setting_names if name in given}
    dictionary = cls(D_IN, D_SAE, metadata=origin, **settings).double()
    dictionary.set_frame(frame)
    for name, parameter in dictionary.named_parameters():
        values = torch.randn(parameter.shape, dtype=torch.float64)
        if name == "threshold":
            values = torch.tensor(0.625, dtype=torch.float64) if values.ndim == 0 else values.abs()
        parameter.copy_(values * {"W_enc": D_IN**-0.5, "r_mag": 0.3}.get(name, 1))
    dictionary.W_dec.div_(dictionary.W_dec.norm(dim=-1, keepdim=True))
    if isinstance(dictionary, MatchingPursuit):
        dictionary.W_enc.copy_(dictionary.W_dec.T)
    return dictionary.eval().requires_grad_(False)


def write_case(package: str, dictionary: Dictionary, x: Tensor, folder: Path, name: str) -> None:
    """Write a dictionary in the package's format, with activations for it."""
    WRITERS[package](dictionary, folder / name)
    torch.save(x, folder / "inputs.pt")
    (folder / "case.json").write_text(json.dumps({"path": name, "refused": ""}), encoding="utf-8")
    dictionary.save(folder / "ours")


def compare_written(row: Row, back: Path, made: Path) -> None:
    """Compare what the package computed with the files we wrote, and its tensors with those that it saved."""
    place = Path(row.dtype, row.architecture)
    if not (back / place).is_dir():
        return
    dictionary, theirs = sae.load(back / place / "ours"), loaded(back / place / "outputs.pt")
    row.compare("written", dictionary, loaded(back / place / "inputs.pt"), theirs)
    folded = dictionary.metadata.get(CONVERTED, {}).get("folded", ["of our own"])
    if all("are kept" in part for part in folded):
        row.verdict = "equal, tensors too"
        before, after = loaded(made / place / "outputs.pt")["tensors"], theirs["tensors"]
        row.failures += [f"{name} is another after writing" for name in different(before, after)]


def different(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same; a threshold below 0 lets through what one of 0 does."""
    assert {"W_dec", "b_dec"} <= before.keys() & after.keys()
    return [
        name
        for name in before.keys() & after.keys()
        if not torch.equal(*(x.clamp(min=0) if name == "threshold" else x for x in (before[name], after[name])))
    ]


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(package: str, interpreter: Path, folder: Path) -> list[Row]:
    """The rows of a package."""
    made, back = folder / "made", folder / "back"
    made.mkdir()
    back.mkdir()
    script = PEER if package in PACKAGES else REPOSITORIES
    run_peer(interpreter, script, package, "make", str(made))
    rows = [*read_cases(package, made, back), *our_cases(package, back)]
    run_peer(interpreter, script, package, "use", str(back))
    for row in rows:
        compare_written(row, back, made)
    return rows


def run_peer(interpreter: Path, script: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
    """Run the package's side in its environment, which does not have this toolkit.

    Raises:
        SystemExit: it failed.
    """
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(environment or {})
    command = [str(interpreter), str(script), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")


def has(interpreter: Path, module: str) -> bool:
    """Whether an environment has a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([interpreter, "-c", code], check=False).returncode == 0


def version_of(interpreter: Path, name: str) -> str:
    """The release of a package in an environment."""
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def table(rows: Iterable[Row]) -> str:
    head = "| package | architecture | dtype | distance, read | distance, written | features that differ | verdict |"
    return "\n".join([head, "|---|---|---|--:|--:|--:|---|", *map(str, rows)])


def main() -> None:
    sys.path.append(str(ROOT / "benchmarks"))
    from peers.environments import PACKAGES as NAMES  # pyright: ignore[reportMissingImports]
    from peers.environments import python  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*PACKAGES, *MODULES), help="these packages alone")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where theirs are, or are made")
    parser.add_argument("--python", type=Path, metavar="PATH", help="of an environment with circuit-tracer or OpenAI's")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows, versions = list[Row](), list[str]()
    given: Path | None = arguments.python
    others = [] if given is None else [name for name in MODULES if has(given, MODULES[name])]
    for package in arguments.only or [*PACKAGES, *others]:
        if given is not None and package in others:
            interpreter = given
            versions.append(f"{package} of {interpreter}")
        elif package in PACKAGES:
            interpreter = python(package, arguments.environments)
            versions.append(f"{NAMES[package]} {version_of(interpreter, NAMES[package])}")
        else:
            parser.error(f"{package}: give an environment that has {MODULES[package]} with --python")
        with tempfile.TemporaryDirectory() as work:
            rows += check(package, interpreter, Path(work))
        if package == "circuit_tracer":
            with tempfile.TemporaryDirectory() as work:
                rows += set_rows(interpreter, Path(work))
    failures = sum(bool(row.failures) for row in rows)
    print(f"{', '.join(versions)}\n\n{table(rows)}\n\n{len(rows) - failures} of {len(rows)} passed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
