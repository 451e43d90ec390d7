"""Transcoders trained by this toolkit beside sparsify's: same rows, same batches, with and without a skip connection.

    python benchmarks/transcoders.py CACHE READS GIVES

CACHE is an activation cache with both hook points, such as `blocks.14.mlp.hook_in` and `blocks.14.hook_mlp_out` of
SmolLM2-135M. sparsify runs in an environment of its own, which the script makes, with its default optimiser and with
Adam, each on activations as they are (`raw`) and scaled to E‖x‖² = d; the ratio is to the best of the four. Results go
to `docs/results/`; that of every training is kept in `--keep`, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
import torch
from peers.environments import FOLDER, python
from quality import KEPT, activations, digest, printed, sources

import sae
from sae.activations import ActivationCache
from sae.config.splits import HELD_OUT, TRAIN

WORKER = Path(__file__).parent / "peers" / "transcoder_worker.py"
PEERS = ("sparsify", "sparsify, Adam", "sparsify, raw", "sparsify, Adam, raw")


def export(cache: ActivationCache, reads: str, gives: str, held_out_rows: int, path: Path) -> tuple[int, int]:
    """Write the eligible activations of both hook points, scaled to E‖x‖² = d, and the scales.

    Returns:
        Numbers of training and held-out rows.
    """
    found: dict[str, Any] = {}
    for side, hook in (("x", reads), ("y", gives)):
        scale = (cache.d_in(hook) / cache.statistics(hook).mean_squared_norm) ** 0.5
        found[side] = (activations(cache, hook, TRAIN) * scale).half()
        found[f"{side}_held_out"] = activations(cache, hook, HELD_OUT, held_out_rows) * scale
        found[f"{side}_scale"] = scale
    torch.save(found, path)
    return len(found["x"]), len(found["x_held_out"])


def train(toolkit: str, skip: bool, data: Path, identity: str, seed: int, a: Any) -> dict[str, Any]:
    """Train and score one, unless that was done before."""
    peer = toolkit.partition(",")[0]
    interpreter = python(peer, a.environments)
    numbers = [str(number) for number in (a.d_sae, a.k, a.steps, a.batch, seed)]
    made_by = (
        printed([interpreter, "-m", "pip", "freeze"]) if peer == "sparsify" else digest(sources(peer, interpreter))
    )
    key = digest([toolkit, str(skip), *numbers, identity, made_by, WORKER])
    kept = a.keep / f"transcoder-{toolkit.replace(', ', '-')}-{'skip' if skip else 'plain'}-{seed}-{key}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    command = [interpreter, WORKER, toolkit, str(int(skip)), data, *numbers]
    found = json.loads(printed(command, OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2")).splitlines()[-1])
    print(f"{toolkit}, skip {skip}, seed {seed}: FVU {found['fvu']:.4f}, {found['seconds']:.0f} s", file=sys.stderr)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def spread(values: list[float], digits: int = 4) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("reads")
    parser.add_argument("gives")
    parser.add_argument("--toolkits", nargs="+", choices=("sae", *PEERS), default=["sae", *PEERS])
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, default=KEPT, help="results of single trainings")
    parser.add_argument("--environments", type=Path, default=FOLDER, help="where the peers' environments are made")
    parser.add_argument("--name", help="of the files in docs/results/; default: transcoders-STEPS-cpu")
    a = parser.parse_args()
    cache = ActivationCache(a.cache)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "activations.pt")
        rows, held_out = export(cache, a.reads, a.gives, a.held_out, data)
        identity = " ".join([cache.manifest.identity(a.reads), cache.manifest.identity(a.gives), str(held_out)])
        found = {
            (toolkit, skip): [train(toolkit, skip, data, identity, seed, a) for seed in range(a.seeds)]
            for skip in (False, True)
            for toolkit in a.toolkits
        }
    lines = ["| skip connection | toolkit | FVU | ÷ best peer | L0 | never fired |", "|---|---|--:|--:|--:|--:|"]
    means = {pair: statistics.mean(one["fvu"] for one in results) for pair, results in found.items()}
    for (toolkit, skip), results in found.items():
        peers = [mean for (other, with_skip), mean in means.items() if other in PEERS and with_skip == skip]
        ratio = f"{means[toolkit, skip] / min(peers):.3f}" if peers else "–"
        name = "ours" if toolkit == "sae" else f"{toolkit} ({results[0]['version']})"
        scores = {key: [float(one[key]) for one in results] for key in ("fvu", "l0", "never_fired")}
        columns = [spread(scores["fvu"]), ratio, spread(scores["l0"], 1), spread(scores["never_fired"], 0)]
        lines.append(f"| {'yes' if skip else 'no'} | {name} | {' | '.join(columns)} |")
    shape = (
        f"{cache.manifest.model.get('name')}, `{a.reads}` → `{a.gives}`, {cache.d_in(a.reads)} → {a.d_sae:,} → "
        f"{cache.d_in(a.gives)}, TopK, k {a.k}, batch {a.batch:,}, {a.steps:,} steps ({a.steps * a.batch / rows:.1f} "
        f"times over {rows:,} rows), {held_out:,} held-out rows, {a.seeds} seeds, mean ± standard deviation over them. "
        f"sae {sae.__version__}."
    )
    settings = {name: value for name, value in vars(a).items() if value is not None and not isinstance(value, Path)}
    numbers = {
        "arguments": settings,
        "activations": identity,
        "rows": [
            {"toolkit": toolkit, "skip": skip, "trainings": results} for (toolkit, skip), results in found.items()
        ],
    }
    title = "Transcoders, beside sparsify's"
    report.write(a.name or f"transcoders-{a.steps}-cpu", title, f"{shape}\n\n" + "\n".join(lines), numbers,
                 report.machine("cpu"))  # fmt: skip


if __name__ == "__main__":
    main()
