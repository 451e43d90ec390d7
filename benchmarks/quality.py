"""Dictionaries trained by this toolkit beside those of its peers: same activations, same batches, default options.

    python benchmarks/quality.py CACHE [HOOK]

CACHE is an activation cache that `sae harvest` made; one on SmolLM2-135M comes from `configs/local-model.yaml`. Each
toolkit runs in an environment of its own, which the script makes. Where an architecture has a penalty whose weight
decides L0, the peers' weight is searched until L0 is within 5 % of k; this toolkit finds its own. Dictionaries of one
architecture are compared where their L0 on held-out rows are within 5 %: for a peer that ended at another L0 this
toolkit's k is searched until it ends there too. Results go to `docs/results/`. A comparison takes hours on a
CPU, minutes with `--device cuda --at-once 9`: every training's result is kept in `--keep` under a key of all that it
depends on (what the cache was made from, settings, versions, and for this toolkit the modules that it trains with), and
the same command goes on. `--peers-from NAME` takes the peers' rows from a comparison in `docs/results/` that was
made with the same settings, possibly on another machine, and trains this toolkit's alone.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from peers.environments import FOLDER, python

import sae
from sae.activations import ActivationCache
from sae.activations.loader import ActivationLoader
from sae.config.splits import HELD_OUT, TRAIN
from sae.training.traits import PENALISED

WORKER = Path(__file__).parent / "peers" / "quality_worker.py"
KEPT = Path(__file__).parents[1] / "docs" / "results" / "trainings"
PEERS = ("saelens", "saelens, target L0", "dictionary_learning")
ONLY = {"saelens, target L0": ("jumprelu",)}
"""Peers that are an option of some architectures."""
SEARCHED = {
    "saelens": {"relu": 3.0, "gated": 3.0, "jumprelu": 3.0},
    "dictionary_learning": {"relu": 1.0, "gated": 1.0},
}
"""Where the search for a peer's sparsity weight begins; what is not here has none, or aims at L0 itself."""
TRACE = """
import sys, torch
from quality_worker import Task, ours
from sae.architectures import ARCHITECTURES
x = torch.randn(64, 8)
for name in ARCHITECTURES:
    ours(Task(name, x, x, d_sae=32, k=4, steps=8, batch=16, seed=0, coefficient=None, device="cpu"))
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "sae"), sep="\\n")
"""
"""Trains small dictionaries and prints which of this toolkit's files that took."""
DEAF = 0.02
"""Least change of log L0 for one of the log weight."""


@dataclass(frozen=True)
class Row:
    """One toolkit's dictionaries of one architecture, a number for each seed; `k` is what was asked for."""

    toolkit: str
    architecture: str
    version: str
    fvu: list[float]
    l0: list[float]
    never_fired: list[int]
    seconds: list[float]
    coefficient: float | None
    other_rules: list[dict[str, Any]]
    k: int | None = None


@dataclass(frozen=True)
class Data:
    """Activations in a file, and what they were made from; a cache made anew elsewhere differs by rounding alone."""

    path: Path
    identity: str
    train_rows: int
    held_out_rows: int


def activations(cache: ActivationCache, hook: str, split: str, count: int | None = None) -> torch.Tensor:
    """The cache's eligible activations `[rows, d_in]`, `count` of them or all, rounded down to whole batches of 512."""
    loader = ActivationLoader(cache, hook, batch_size=512, split=split)
    wanted = min(count or loader.tokens_per_epoch, loader.tokens_per_epoch)
    return torch.cat(list(itertools.islice(loader, wanted // 512))).float()


def export(cache: ActivationCache, hook: str, held_out_rows: int, path: Path) -> Data:
    """Write the cache's eligible activations, scaled to E‖x‖² = d_in."""
    scale = (cache.d_in(hook) / cache.statistics(hook).mean_squared_norm) ** 0.5
    train = (activations(cache, hook, TRAIN) * scale).half()
    held_out = activations(cache, hook, HELD_OUT, held_out_rows) * scale
    torch.save({"train": train, "held_out": held_out}, path)
    return Data(path, f"{cache.manifest.identity(hook)} {len(held_out)}", len(train), len(held_out))


def run(toolkit: str, architecture: str, data: Data, seed: int, coefficient: float | None, a: Any) -> dict[str, Any]:
    """Train and score one, unless that was done before."""
    weight = "default" if coefficient is None else repr(coefficient)
    numbers = [str(number) for number in (a.d_sae, a.k, a.steps, a.batch, seed)]
    interpreter = python(toolkit, a.environments)
    made_by = digest(sources(toolkit, interpreter))
    key = digest([toolkit, architecture, *numbers, weight, a.device, data.identity, made_by])
    kept = a.keep / f"{toolkit.replace(', ', '-').replace(' ', '-')}-{architecture}-{seed}-{key}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    command = [interpreter, WORKER, toolkit, architecture, data.path, *numbers, weight, a.device]
    threads = max(1, torch.get_num_threads() // a.at_once)
    found = json.loads(printed(command, OMP_NUM_THREADS=str(threads)).splitlines()[-1])
    print(
        f"{toolkit} {architecture} seed {seed} weight {weight}: FVU {found['fvu']:.4f}, L0 {found['l0']:.1f}, "
        f"{found['never_fired']} never fired, {found['seconds']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(".tmp")
    unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(kept)
    return found


@functools.cache
def sources(toolkit: str, interpreter: Path) -> tuple[Path | str, ...]:
    """What decides how a toolkit trains: its version, or our own code; and the worker."""
    if toolkit in PEERS:
        return WORKER, printed([interpreter, "-m", "pip", "freeze"])
    files = printed([interpreter, "-c", TRACE]).splitlines()
    kernels = Path(sae.__file__).parent / "kernels"  # some are imported where there is a GPU only
    return WORKER, torch.__version__, *sorted({*map(Path, files), *kernels.rglob("*.py")})


def printed(command: list[Any], **environment: str) -> str:
    """What a command prints, run where the worker is.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=WORKER.parent, env={**os.environ, **environment}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr[-2000:]}")
    return done.stdout


def digest(parts: Iterable[Path | str]) -> str:
    """A hash of texts and files' contents."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode() if isinstance(part, str) else part.read_bytes()).digest())
    return whole.hexdigest()[:16]


def search(toolkit: str, architecture: str, data: Data, a: Any) -> tuple[float, dict[str, Any]]:
    """The sparsity weight at which a peer's L0 is k within 5 %, by secants of log L0 over log weight.

    Given up where L0 does not follow the weight: some take longer than a short training to move.
    """
    weight, tried = SEARCHED[toolkit][architecture], []
    for _ in range(a.searches):
        found = run(toolkit, architecture, data, 0, weight, a)
        tried.append((math.log(weight), math.log(max(found["l0"], 1e-3) / a.k), found))
        if close(found["l0"], a.k):
            break
        if len(tried) > 1 and abs(tried[-1][1] - tried[-2][1]) < DEAF * abs(tried[-1][0] - tried[-2][0]):
            break
        slope = -1.0
        if len(tried) > 1:
            (x0, y0, _), (x1, y1, _) = tried[-2:]
            slope = min(-0.2, (y1 - y0) / (x1 - x0)) if x1 != x0 else -1.0
        weight = math.exp(tried[-1][0] - max(-1.5, min(1.5, tried[-1][1] / slope)))
    best = min(tried, key=lambda entry: abs(entry[1]))
    return math.exp(best[0]), best[2]


def compare(toolkit: str, architecture: str, data: Data, a: Any) -> Row:
    """All seeds of one toolkit and architecture."""
    coefficient, found = None, []
    if architecture in SEARCHED.get(toolkit, {}):
        coefficient, first = search(toolkit, architecture, data, a)
        found.append(first)
    found += [run(toolkit, architecture, data, seed, coefficient, a) for seed in range(len(found), a.seeds)]
    return Row(
        toolkit, architecture, found[0]["version"], [f["fvu"] for f in found], [f["l0"] for f in found],
        [f["never_fired"] for f in found], [f["seconds"] for f in found], coefficient,
        [f["other_rules"] for f in found], a.k,
    )  # fmt: skip


def measured_before(name: str, data: Data, a: Any) -> tuple[list[Row], str]:
    """The peers' rows of a comparison that was written down, and where and when it was made.

    Raises:
        SystemExit: it was made with other settings or on other activations, or lacks an architecture.
    """
    held = json.loads((report.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    if "peers_from" in held["arguments"]:
        raise SystemExit(f"--peers-from {name}: its peers are of {held['arguments']['peers_from']}; name that")
    recorded = "activations" in held
    made_with = {**held["arguments"], "activations": held.get("activations", data.identity)}
    other_name = made_with["activations"] == a.known_as
    if other_name:
        made_with["activations"] = data.identity
    now = {**vars(a), "activations": data.identity}
    for setting in ("activations", "d_sae", "k", "batch", "steps", "held_out"):
        if made_with[setting] != now[setting]:
            raise SystemExit(f"--peers-from {name}: made with {setting} {made_with[setting]}, now {now[setting]}")
    rows = [Row(**row) for row in held["rows"] if row["toolkit"] in PEERS and row["architecture"] in a.architectures]
    if missing := set(a.architectures) - {row.architecture for row in rows}:
        raise SystemExit(f"--peers-from {name}: has no peer's {', '.join(sorted(missing))}")
    machine, seeds = held["machine"], held["arguments"]["seeds"]
    doubt = "" if recorded else ", which does not say what its activations were made from"
    if other_name:
        doubt = f", whose activations are given as the same under another identity, {a.known_as[:12]}…"
    return rows, f"{name}, {machine['date']}, {machine.get('device', machine['processor'])}, {seeds} seeds{doubt}"


def close(l0: float, wanted: float) -> bool:
    """Whether two L0 may be compared."""
    return wanted > 0 and abs(l0 / wanted - 1) <= 0.05


def beside(row: Row, peers: Iterable[Row], data: Data, a: Any) -> list[Row]:
    """This toolkit's row of a penalised architecture, and one more for each peer that ended at another L0."""
    found = [row]
    for peer in peers:
        if peer.architecture == row.architecture and not any(comparable(ours, peer) for ours in found):
            k = k_for(row.architecture, statistics.mean(peer.l0), statistics.mean(row.l0), data, a)
            if k is not None:
                found.append(compare("sae", row.architecture, data, with_k(a, k)))
    return found


def k_for(architecture: str, wanted: float, came_of_it: float, data: Data, a: Any) -> int | None:
    """The k with which this toolkit's L0 on held-out rows is as wanted; None where no training came there.

    What is steered is L0 in training; on held-out rows it is higher, so k is corrected by what came of it, at first
    of the k that all were asked for.
    """
    tried: set[int] = set()
    k = round(a.k * wanted / max(came_of_it, 1e-3))
    while len(tried) < a.searches:
        k = min(a.d_sae, max(1, k))
        if k in tried:
            return None
        tried.add(k)
        l0 = run("sae", architecture, data, 0, None, with_k(a, k))["l0"]
        if close(l0, wanted):
            return k
        k = round(k * wanted / max(l0, 1e-3))
    return None


def with_k(a: Any, k: int) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(a), "k": k})


def comparable(row: Row, peer: Row) -> bool:
    """Of one architecture, and of one L0 where that is not the same by construction."""
    if row.architecture != peer.architecture:
        return False
    return row.architecture not in PENALISED or close(statistics.mean(row.l0), statistics.mean(peer.l0))


def best_fvu(row: Row) -> list[float]:
    """By the rule that is kinder to the toolkit."""
    others = [rules["batch rule"]["fvu"] for rules in row.other_rules if "batch rule" in rules]
    return others if others and statistics.mean(others) < statistics.mean(row.fvu) else row.fvu


def markdown(rows: list[Row], a: Any) -> str:
    """A table for each architecture."""

    def spread(values: list[float], digits: int) -> str:
        deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{deviation}"

    cells = []
    for row in rows:
        peers = [other for other in rows if other.toolkit in PEERS and comparable(row, other)]
        best = min((statistics.mean(best_fvu(peer)) for peer in peers), default=None)
        rules = [r["batch rule"]["fvu"] for r in row.other_rules if "batch rule" in r]
        cells.append(
            [
                row.architecture,
                f"{row.toolkit} {row.version}",
                "–" if row.k is None else str(row.k),
                spread(row.fvu, 4),
                spread(rules, 4) if rules else "–",
                "–" if best is None else f"{statistics.mean(row.fvu) / best:.3f}",
                spread(row.l0, 1),
                spread([float(n) for n in row.never_fired], 0),
                "–" if row.coefficient is None else f"{row.coefficient:.3g}",
            ]
        )
    head = [
        "architecture", "toolkit", "k", "FVU", "FVU by the batch rule", "÷ best peer", "L0",
        f"of {a.d_sae:,} never fired", "searched weight",
    ]  # fmt: skip
    return report.table(head, cells, left=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("hook", nargs="?", help="default: the cache's first")
    parser.add_argument("--architectures", nargs="+", default=["topk", "batch_topk"])
    parser.add_argument("--toolkits", nargs="+", default=["sae", *PEERS])
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--searches", type=int, default=6, help="trainings at most to come to an L0")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--at-once", type=int, default=1, help="trainings beside each other")
    parser.add_argument("--keep", type=Path, default=KEPT, help="results of single trainings")
    parser.add_argument("--environments", type=Path, default=FOLDER, help="where the peers' environments are made")
    parser.add_argument(
        "--peers-from",
        metavar="NAME",
        help="comparison in docs/results/ with the peers' rows; only ours are trained",
    )
    parser.add_argument(
        "--known-as",
        metavar="IDENTITY",
        help="with --peers-from: what that comparison calls these activations, by a manifest of an older version",
    )
    parser.add_argument("--name", help="of the files in docs/results/; default: quality-STEPS-DEVICE")
    a = parser.parse_args()
    if a.peers_from:
        a.toolkits = ["sae"]
    cache = ActivationCache(a.cache)
    hook = a.hook or next(iter(cache.manifest.hooks))
    with tempfile.TemporaryDirectory() as folder:
        data = export(cache, hook, a.held_out, Path(folder) / "activations.pt")
        before, where = measured_before(a.peers_from, data, a) if a.peers_from else ([], "")
        pairs = itertools.product(a.architectures, a.toolkits)
        tasks = [(arch, toolkit) for arch, toolkit in pairs if arch in ONLY.get(toolkit, (arch,))]
        with ThreadPoolExecutor(a.at_once) as pool:
            rows = [*pool.map(lambda task: compare(task[1], task[0], data, a), tasks), *before]
            peers = tuple(row for row in rows if row.toolkit in PEERS)
            ours = [row for row in rows if row.toolkit == "sae" and row.architecture in PENALISED]
            matched = list(pool.map(lambda row: beside(row, peers, data, a), ours))
            for row, found in zip(ours, matched, strict=True):
                rows[rows.index(row) : rows.index(row) + 1] = found
    rows.sort(key=lambda row: a.architectures.index(row.architecture))
    model = cache.manifest.model.get("name")
    shape = (
        f"{model}, `{hook}`, {cache.d_in(hook)} → {a.d_sae:,}, k {a.k}, batch {a.batch:,}, {a.steps:,} steps "
        f"({a.steps * a.batch / data.train_rows:.1f} times over {data.train_rows:,} rows), "
        f"{data.held_out_rows:,} held-out rows, {a.seeds} seeds, mean ± standard deviation over them."
        + (f" Rows of the peers: {where}." if where else "")
    )
    described = report.machine(a.device)
    text = f"{shape}\n\n{markdown(rows, a)}"
    settings = {name: value for name, value in vars(a).items() if value is not None and not isinstance(value, Path)}
    numbers = {"arguments": settings, "activations": data.identity, "rows": [vars(row) for row in rows]}
    name, title = a.name or f"quality-{a.steps}-{a.device}", "Quality of training, beside other toolkits"
    report.write(name, title, text, numbers, described)


if __name__ == "__main__":
    main()
