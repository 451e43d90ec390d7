"""Whole training steps of this toolkit and of others in turns, and what the same steps make of the same activations.

Every toolkit runs in a process of its own (`peers/server.py`), with the options that make it fastest. All of them
compile before the first is timed. Memory is that of the toolkit's own process, without the batches it is given.
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ceilings
import report
import torch
from gpu_parts import Context, Row
from peers.environments import FOLDER, PACKAGES
from peers.steppers import Shape

SERVER = Path(__file__).parent / "peers" / "server.py"
ROOT = Path(__file__).parents[1]
OURS = "sae"
TOPK_ONLY = ("sparsify", "saelens, sparse, autocast, compiled")
"""sparsify has no BatchTopK, and SAELens's is dense."""
TOOLKITS = (OURS, *TOPK_ONLY, "saelens, autocast, compiled", "dictionary_learning, autocast", "llamascopium, Triton")
PLANNED = 10_000
"""Steps that the schedules of timed trainings are made for."""
QUALITY_STEPS = 400
ROOMY = 100e9
"""Bytes of GPU memory from which all shapes are prepared at once."""


@dataclass(frozen=True)
class Sizes:
    """What is timed: (d_sae, batch, turns), in order of value; seconds of a turn; and what quality is measured at."""

    d_in: int
    k: int
    widths: Sequence[tuple[int, int, int]]
    seconds: float
    quality: tuple[int, int, int]
    patience: float


REAL = Sizes(768, 32, ((24_576, 8192, 3), (131_072, 8192, 2), (6144, 2048, 3)), 0.5, (24_576, 8192, QUALITY_STEPS), 75)
DRY = Sizes(32, 4, ((256, 128, 2), (512, 128, 1)), 0.05, (256, 128, 20), 120)


@dataclass
class Server:
    """A toolkit at work in another process, or the reason why it is not."""

    toolkit: str
    process: subprocess.Popen[str] | None = None
    answers: queue.Queue[dict[str, Any] | None] = field(default_factory=queue.Queue)
    version: str = ""
    missing: str | None = None
    failed: dict[Shape, str] = field(default_factory=dict)

    @staticmethod
    def start(toolkit: str, context: Context) -> Server:
        """Start it; the first answer, its version, comes later."""
        found = environment(toolkit, context)
        if isinstance(found, str):
            return Server(toolkit, missing=found)
        interpreter, variables = found
        process = subprocess.Popen(
            [interpreter, SERVER, toolkit], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, **variables},
        )  # fmt: skip
        server = Server(toolkit, process)
        threading.Thread(target=server._listen, daemon=True).start()
        return server

    def _listen(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(json.loads(line))
        self.answers.put(None)

    def greet(self, seconds: float) -> None:
        """Wait for its version."""
        self.version = str(self.receive(seconds).get("version", ""))

    def send(self, what: str, shape: Shape, **more: float) -> None:
        """Ask for something; the answer is to be received."""
        if self.missing is None:
            assert self.process is not None
            assert self.process.stdin is not None
            try:
                self.process.stdin.write(json.dumps({"do": what, "shape": asdict(shape), **more}) + "\n")
            except OSError:
                self.give_up(f"it ended with status {self.process.wait()}")

    def receive(self, seconds: float) -> dict[str, Any]:
        """The answer to the oldest open question; `{"error": …}` if there is none in time, and then it is stopped."""
        if self.missing is not None:
            return {"error": self.missing}
        try:
            found = self.answers.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self.give_up(f"no answer in {seconds:.0f} s")
        else:
            if found is not None:
                return found
            assert self.process is not None
            self.give_up(f"it ended with status {self.process.wait()}")
        return {"error": self.missing}

    def ask(self, what: str, shape: Shape, patience: float, **more: float) -> dict[str, Any]:
        self.send(what, shape, **more)
        return self.receive(patience)

    def note(self, shape: Shape, answer: dict[str, Any]) -> None:
        """Remember whether the shape can be used."""
        self.failed.pop(shape, None)
        if "error" in answer:
            self.failed[shape] = str(answer["error"])

    def give_up(self, reason: str) -> None:
        """Stop the process; everything asked for from now on has this reason for an answer."""
        self.missing = self.missing or reason
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def environment(toolkit: str, context: Context) -> tuple[Path, dict[str, str]] | str:
    """The interpreter and the variables that a toolkit needs, or why there are none."""
    family = toolkit.partition(",")[0]
    variables = {} if context.on_gpu else {"SPARSIFY_DISABLE_TRITON": "1", "OMP_NUM_THREADS": "1"}
    folder = context.peers.get(family)
    paths = [str(path) for path in (folder, ROOT if family == OURS else None) if path is not None]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    if family == OURS or folder is not None:
        return Path(sys.executable), variables
    made = FOLDER / family
    if family in PACKAGES and (made / "installed").is_file():
        return made / "bin" / "python", variables
    return "not installed: neither a folder of --peers nor an environment of benchmarks/training.py"


def shapes(sizes: Sizes, device: str) -> Iterator[tuple[Shape, int]]:
    """Every shape to be timed, with its turns."""
    for d_sae, batch, turns in sizes.widths:
        for architecture in ("topk", "batch_topk"):
            yield Shape(architecture, sizes.d_in, d_sae, sizes.k, batch, PLANNED, device), turns


def fits(toolkit: str, shape: Shape) -> bool:
    return shape.architecture == "topk" or toolkit not in TOPK_ONLY


def steps(context: Context) -> None:
    """Prepare, time in turns, then train and score."""
    sizes = DRY if context.dry else REAL
    servers = [Server.start(toolkit, context) for toolkit in TOOLKITS]
    for server in servers:
        server.greet(60)
        if server.missing is not None:
            context.emit(f"missing {server.toolkit}", {"toolkit": server.toolkit, "missing": server.missing})
    wanted = list(shapes(sizes, context.device))
    roomy = not context.on_gpu or torch.cuda.get_device_properties(0).total_memory > ROOMY
    groups = [wanted] if roomy else [[one] for one in wanted]
    ask_to_prepare(servers, groups[0])
    context.go()
    top = None
    for number, group in enumerate(groups):
        if number:
            ask_to_prepare(servers, group)
        wait_for_prepared(servers, group, sizes.patience)
        top = top or measured_ceilings(context)
        for shape, turns in group:
            compare(servers, shape, turns, sizes.seconds, top, context)
    quality(servers, sizes, context)


def ask_to_prepare(servers: Sequence[Server], group: Sequence[tuple[Shape, int]]) -> None:
    for server in servers:
        for shape, _ in group:
            if fits(server.toolkit, shape):
                server.send("prepare", shape)


def wait_for_prepared(servers: Sequence[Server], group: Sequence[tuple[Shape, int]], seconds: float) -> None:
    """Note what could not be prepared. A toolkit that takes longer is stopped, for nothing may run beside a timing."""
    deadline = time.monotonic() + seconds
    for server in servers:
        for shape, _ in group:
            if fits(server.toolkit, shape):
                server.note(shape, server.receive(deadline - time.monotonic()))


def measured_ceilings(context: Context) -> ceilings.Ceilings:
    """What products and copies reach here, in the type that products have."""
    dtype = torch.bfloat16 if context.on_gpu else torch.float32
    top = ceilings.measure(context.device, dtype, small=context.dry)
    context.emit("ceilings", {"ceilings": asdict(top), "dtype": str(dtype).removeprefix("torch.")})
    if context.on_gpu:
        torch.cuda.empty_cache()
    return top


def compare(
    servers: Sequence[Server], shape: Shape, turns: int, seconds: float, top: ceilings.Ceilings, context: Context
) -> None:
    """Every toolkit at one shape, in turns; the shape is dropped afterwards."""
    there = [server for server in servers if fits(server.toolkit, shape) and server.version]
    for server in there:
        if "OutOfMemory" in server.failed.get(shape, ""):  # others were preparing larger ones
            server.note(shape, server.ask("prepare", shape, 60))
    lowest = ceilings.floor(top, d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k, batch=shape.batch)
    found: dict[str, Row] = {}
    for turn in range(turns):
        for server in (*there[turn % len(there) :], *there[: turn % len(there)]):
            row = found.setdefault(server.toolkit, {**described(server, shape), "floor": lowest, "seconds": []})
            if shape not in server.failed and not server.missing:
                answer = server.ask("time", shape, 60, seconds=seconds)
                server.note(shape, answer)
                row["seconds"] += answer.get("seconds", [])
                row["peak_bytes"] = max(row.get("peak_bytes", 0), answer.get("peak_bytes", 0))
            if reason := server.failed.get(shape) or server.missing:
                row["error"] = reason
            context.emit(f"{shape} {server.toolkit}", row)
    for server in there:
        server.ask("drop", shape, 20)


def quality(servers: Sequence[Server], sizes: Sizes, context: Context) -> None:
    """Train from the beginning, on the same batches in the same order, and score on the same others."""
    d_sae, batch, length = sizes.quality
    for architecture in ("topk", "batch_topk"):
        shape = Shape(architecture, sizes.d_in, d_sae, sizes.k, batch, length, context.device)
        for server in servers:
            if fits(server.toolkit, shape) and server.version:
                answer = server.ask("score", shape, 90)
                context.emit(f"quality {shape} {server.toolkit}", {**described(server, shape), "quality": answer})


def described(server: Server, shape: Shape) -> Row:
    return {"toolkit": server.toolkit, "version": server.version, "shape": asdict(shape)}


def markdown(rows: Sequence[Row]) -> str:
    """Ceilings, a table for each shape, a table of quality, and what is missing."""
    parts = []
    for row in rows:
        if "ceilings" in row:
            top = ceilings.Ceilings(**row["ceilings"])
            parts.append(
                f"Ceilings: {row['dtype']} products {top.flops / 1e12:.2f} TFLOP/s, memory "
                f"{top.bytes_per_second / 1e9:,.0f} GB/s.\n"
            )
    timed = [row for row in rows if "floor" in row]
    for shape in dict.fromkeys(json.dumps(row["shape"]) for row in timed):
        these = [row for row in timed if json.dumps(row["shape"]) == shape]
        parts.append(f"### {heading(Shape(**json.loads(shape)))}\n\n{table_of_steps(these)}")
    scored = [row for row in rows if "quality" in row]
    if scored:
        shape = Shape(**scored[0]["shape"])
        about = f"{shape.steps:,} steps of batch {shape.batch:,}, {shape.d_in:,} → {shape.d_sae:,}, k {shape.k}"
        parts.append(f"### Quality of {about}\n\n{table_of_quality(scored)}")
    missing = [f"{row['toolkit']}: {row['missing']}." for row in rows if "missing" in row]
    return "\n".join([*parts, *(["Left out. " + " ".join(missing) + "\n"] if missing else [])])


def named(row: Row) -> str:
    """The toolkit with its version and how it is used."""
    family, comma, options = row["toolkit"].partition(",")
    return f"{family} {row['version']}{comma}{options}"


def heading(shape: Shape) -> str:
    return f"{shape.architecture}, {shape.d_in:,} → {shape.d_sae:,}, batch {shape.batch:,}, k {shape.k}"


def table_of_steps(rows: Sequence[Row]) -> str:
    """One shape; a toolkit that failed has its error in place of numbers."""
    medians = {row["toolkit"]: statistics.median(row["seconds"]) for row in rows if row["seconds"]}
    fastest = min((seconds for toolkit, seconds in medians.items() if toolkit != OURS), default=None)
    cells = []
    for row in rows:
        name = named(row)
        if row["toolkit"] not in medians:
            cells.append([name, f"failed: {row.get('error', 'not timed')}", *["–"] * 6])
            continue
        seconds = medians[row["toolkit"]]
        cells.append(
            [
                name, f"{1e3 * seconds:,.2f}", f"{1e3 * min(row['seconds']):,.2f} to {1e3 * max(row['seconds']):,.2f}",
                f"{row['shape']['batch'] / seconds:,.0f}", "–" if fastest is None else f"{fastest / seconds:.2f}",
                f"{1e3 * row['floor']:,.2f}", f"{seconds / row['floor']:.2f}", f"{row['peak_bytes'] / 1e9:.2f}",
            ]
        )  # fmt: skip
    head = [
        "toolkit", "ms a step", "all blocks", "tokens/s", "× fastest peer", "floor, ms", "step ÷ floor", "peak GB",
    ]  # fmt: skip
    return report.table(head, cells)


def table_of_quality(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        name, found = named(row), row["quality"]
        if "error" in found:
            cells.append([row["shape"]["architecture"], name, f"failed: {found['error']}", *["–"] * 3])
            continue
        rules = [f"{rule['fvu']:.4f}" for rule in found["other_rules"].values()]
        cells.append(
            [
                row["shape"]["architecture"], name, f"{found['fvu']:.4f}", rules[0] if rules else "–",
                f"{found['l0']:.1f}", f"{found['never_fired']:,}",
            ]
        )  # fmt: skip
    return report.table(["architecture", "toolkit", "FVU", "FVU by the batch rule", "L0", "never fired"], cells, left=2)
