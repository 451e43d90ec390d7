"""Training steps of this toolkit beside its peers', in one run, each toolkit in a process of its own.

    python benchmarks/training.py                                                # CPU, GPT-2 small's shape
    python benchmarks/training.py --device cuda --batches 4096 8192 16384 --widths 24576 131072 --ks 32 64

The toolkits take turns, so that a machine that slows down slows all of them. The floor is what the machine's measured
ceilings allow (`ceilings.floor`). Results go to `docs/results/`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import ceilings
import report
import torch
from peers.environments import FOLDER, PACKAGES, python
from peers.steppers import Shape

from sae.kernels.products import multiplies_bfloat16

WORKER = Path(__file__).parent / "peers" / "worker.py"
SCHEDULE = 10_000
"""Steps that a toolkit's schedules are made for."""
OURS = ("sae", "sae, float32")
"""By default the encoder's product is in bfloat16 where the device has instructions for it."""
SPARSIFY = ("sparsify", "sparsify, float32", "sparsify, Adam", "sparsify, Adam, float32")
"""By default signum and bfloat16 autocast; on a CPU without bfloat16 instructions float32 is faster."""
TOPK_ONLY = ("saelens, sparse", *SPARSIFY)
"""sparsify has no BatchTopK, and SAELens's is dense."""
IN_BFLOAT16 = ("sparsify", "sparsify, Adam", "llamascopium")


@dataclass(frozen=True)
class Row:
    """A toolkit at one shape: seconds of every timed step (on a GPU, of every block of steps) over all turns."""

    toolkit: str
    version: str
    seconds: list[float]
    peak_bytes: int
    floor: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compare(shape: Shape, toolkits: list[str], arguments: argparse.Namespace, floors: dict[str, float]) -> list[Row]:
    """Every toolkit at one shape, in turns."""
    found: dict[str, list[dict]] = {toolkit: [] for toolkit in toolkits}
    for _, toolkit in itertools.product(range(arguments.turns), toolkits):
        numbers = (shape.d_in, shape.d_sae, shape.k, shape.batch, arguments.steps, shape.steps)
        command = [python(toolkit, arguments.environments), WORKER, toolkit, shape.architecture, *map(str, numbers)]
        done = subprocess.run([*command, shape.device], capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"status {done.returncode}"
            print(f"{toolkit}, {shape}: failed ({last})", file=sys.stderr)
            continue
        found[toolkit].append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{toolkit}, {shape}: {statistics.median(found[toolkit][-1]['seconds']):.4f} s", file=sys.stderr)
    return [
        Row(
            toolkit,
            turns[0]["version"],
            list(itertools.chain.from_iterable(turn["seconds"] for turn in turns)),
            max(turn["peak_bytes"] for turn in turns),
            floors[dtype_of(toolkit, shape.device)],
        )
        for toolkit, turns in found.items()
        if turns
    ]


def dtype_of(toolkit: str, device: str) -> str:
    """In which type a toolkit makes its large products."""
    ours = toolkit == OURS[0] and multiplies_bfloat16(torch.device(device))
    return "bfloat16" if ours or toolkit in IN_BFLOAT16 else "float32"


def markdown(shape: Shape, rows: list[Row], memory: str) -> str:
    """One comparison as a table."""
    peers = [row.median for row in rows if row.toolkit not in OURS]
    fastest = min(peers) if peers else None
    cells = [
        [
            f"{row.toolkit} {row.version}",
            f"{1e3 * row.median:,.1f}",
            f"{1e3 * min(row.seconds):,.1f} to {1e3 * max(row.seconds):,.1f}",
            f"{shape.batch / row.median:,.0f}",
            "–" if fastest is None else f"{fastest / row.median:.2f}",
            f"{1e3 * row.floor:,.1f}",
            f"{row.median / row.floor:.2f}",
            f"{row.peak_bytes / 1e9:.2f}",
        ]
        for row in rows
    ]
    head = [
        "toolkit", "ms a step", "all steps", "tokens/s", "× fastest peer", "floor, ms", "measured ÷ floor",
        f"peak {memory}, GB",
    ]  # fmt: skip
    title = f"## {shape.architecture}, d_in {shape.d_in}, d_sae {shape.d_sae:,}, batch {shape.batch:,}, k {shape.k}"
    return f"{title}\n\n{report.table(head, cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--widths", type=int, nargs="+", default=[24576])
    parser.add_argument("--batches", type=int, nargs="+", default=[2048])
    parser.add_argument("--ks", type=int, nargs="+", default=[32])
    parser.add_argument("--architectures", nargs="+", default=["topk", "batch_topk"])
    parser.add_argument(
        "--toolkits",
        nargs="+",
        choices=[*OURS, *dict.fromkeys((*PACKAGES, *TOPK_ONLY))],
        help="default: all that run on the device",
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps a turn; on a GPU, blocks of twenty")
    parser.add_argument("--turns", type=int, default=3, help="times each toolkit is run")
    parser.add_argument("--environments", type=Path, default=FOLDER, help="where the peers' environments are made")
    parser.add_argument("--name", help="of the files in docs/results/; default: training-DEVICE")
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    toolkits = arguments.toolkits or [
        *OURS, "saelens", "saelens, sparse", "dictionary_learning", "llamascopium",
        *(SPARSIFY[:1] if on_gpu else SPARSIFY),
    ]  # fmt: skip
    tops = {
        name: ceilings.measure(arguments.device, dtype)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    described = report.machine(arguments.device)
    text = "Ceilings: " + "; ".join(
        f"{name} products {top.flops / 1e12:.3f} TFLOP/s, memory {top.bytes_per_second / 1e9:.1f} GB/s"
        for name, top in tops.items()
    )
    numbers: list[dict] = []
    parts = [f"{text}.\n"]
    shapes = itertools.product(arguments.architectures, arguments.widths, arguments.ks, arguments.batches)
    for architecture, d_sae, k, batch in shapes:
        shape = Shape(architecture, arguments.d_in, d_sae, k, batch, SCHEDULE, arguments.device)
        floors = {
            name: ceilings.floor(top, d_in=shape.d_in, d_sae=d_sae, k=k, batch=batch) for name, top in tops.items()
        }
        chosen = [toolkit for toolkit in toolkits if toolkit not in TOPK_ONLY or architecture == "topk"]
        rows = compare(shape, chosen, arguments, floors)
        parts.append(markdown(shape, rows, "GPU memory" if on_gpu else "memory"))
        numbers.append({"shape": asdict(shape), "rows": [asdict(row) for row in rows]})
    results = {"ceilings": {name: asdict(top) for name, top in tops.items()}, "comparisons": numbers}
    name = arguments.name or f"training-{arguments.device}"
    report.write(name, f"Training steps, {arguments.device.upper()}", "\n".join(parts), results, described)


if __name__ == "__main__":
    main()
