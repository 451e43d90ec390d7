"""Everything worth measuring on a GPU that is lent for minutes, in one command, the most valuable first.

    python benchmarks/peers/wheels.py peers               # where there is a network: wheels of other toolkits
    python benchmarks/gpu.py --peers peers --minutes 9    # on the machine with the GPU: any, without a network
    python benchmarks/gpu.py --dry-run                    # on any machine: every part with small shapes on the CPU

The report, `gpu-CARD.md` and `.json` in docs/results/ or `--out`, is written anew after every finished row. Each part
(`gpu_parts.PARTS`) runs in a process of its own with a limit of time, so that one that crashes or hangs loses its own
unfinished row alone; what is not reached says so. `--only steps selection` runs these parts anew and keeps the report's
other parts if they are of the same commit; then the minutes are theirs.

**Preparing.** The machine needs Python 3.10 or newer with PyTorch 2.9 or newer, Triton, NumPy, einops, safetensors,
jaxtyping, threadpoolctl, click, rich, PyYAML, transformers and pytest with pytest-xdist. Everything else is in wheels
that the first command collects, for the Python of `--python` (default: 3.12): a folder for each other toolkit, and one
named `sae` with what this package needs besides. Here they are installed into a temporary folder each. Take along the
working tree and the folder of wheels, less than 20 MB. Without `--peers`, what is installed is used, and toolkits that
`benchmarks/training.py` has made environments for.

**Timing.** Single operations are timed by the GPU's events, whole steps and roads by the clock after synchronising,
always after warming up; what is compared takes turns, inputs rotate, and medians are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the package need not be installed

import report  # noqa: E402
import torch  # noqa: E402
from gpu_parts import PARTS, Context, PartSkipped, Row  # noqa: E402
from peers.absent import stand_in_for  # noqa: E402

END = 8.0
"""Seconds at the end in which no part is started."""


class Board:
    """What has been found, on disk after every row."""

    def __init__(self, name: str, title: str, folder: Path, described: dict[str, str | int]) -> None:
        self.name, self.title, self.folder, self.described = name, title, folder, described
        self.parts: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()

    def keep_others(self, chosen: list[str]) -> None:
        """Take over parts that are not run, if they are of this commit."""
        path = self.folder / f"{self.name}.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if before.get("machine", {}).get("commit") == self.described["commit"]:
            self.parts = {name: part for name, part in before["parts"].items() if name in PARTS and name not in chosen}

    def state(self, part: str, state: str, seconds: float = 0.0) -> None:
        with self.lock:
            entry = self.parts.setdefault(part, {"rows": {}})
            self.parts[part] = {"state": state, "seconds": seconds, "rows": entry["rows"]}
            self.save()

    def row(self, part: str, key: str, row: Row) -> None:
        with self.lock:
            self.parts[part]["rows"][key] = row
            self.save()

    def save(self) -> None:
        parts = {name: self.parts[name] for name in PARTS if name in self.parts}
        states = [[PARTS[name].title, part["state"], f"{part['seconds']:.0f}"] for name, part in parts.items()]
        text = report.table(["part", "state", "s"], states, left=2)
        for name, part in parts.items():
            if part["rows"]:
                text += f"\n## {PARTS[name].title}\n\n{PARTS[name].markdown(list(part['rows'].values()))}"
        report.save(self.name, self.title, text, {"parts": parts}, self.described, self.folder)


class Running:
    """A part's process."""

    def __init__(self, name: str, seconds: float, arguments: argparse.Namespace, board: Board) -> None:
        self.name, self.board, self.failure = name, board, ""
        command = [sys.executable, Path(__file__), "--part", name, "--seconds", str(seconds)]
        command += ["--dry-run"] if arguments.dry_run else []
        command += ["--peers", arguments.peers] if arguments.peers else []
        added = [arguments.peers / "sae"] if arguments.peers and (arguments.peers / "sae").is_dir() else []
        paths = os.pathsep.join(map(str, [*added, *filter(None, [os.getenv("PYTHONPATH")])]))
        board.state(name, "running")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = json.loads(line)
            if "failure" in found:
                self.failure = found["failure"]
            else:
                self.board.row(self.name, found["key"], found["row"])

    def finish(self, limit: float) -> None:
        """Let it go, and stop it after `limit` seconds, with all that it started."""
        started = time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write("go\n")
        try:
            status = self.process.wait(limit)
            state = self.failure or ("done" if status == 0 else f"failed: status {status}")
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
        self.stop()
        self.reader.join(5)
        seconds = time.monotonic() - started
        print(f"{self.name}: {state}, {seconds:.0f} s", file=sys.stderr, flush=True)
        self.board.state(self.name, state, seconds)

    def stop(self) -> None:
        """End the process and all that it has started, which are of one session."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)


def run(arguments: argparse.Namespace, board: Board) -> None:
    """All chosen parts in order, within the minutes."""
    end = time.monotonic() + 60 * arguments.minutes
    chosen = [name for name in PARTS if name in arguments.only]
    share = (60 * arguments.minutes - END) / sum(PARTS[name].seconds for name in chosen)
    limits = {name: share * PARTS[name].seconds for name in chosen}
    started: dict[str, Running] = {}
    try:
        for number, name in enumerate(chosen):
            left = end - time.monotonic()
            if left < END:
                board.state(name, "not reached")
                continue
            for soon in chosen[number : number + 2]:
                if soon not in started and (soon == name or PARTS[soon].ahead):
                    started[soon] = Running(soon, limits[soon], arguments, board)
            started[name].finish(min(limits[name], left))
    finally:
        for running in started.values():
            running.stop()


def work(arguments: argparse.Namespace) -> None:
    """One part, in its own process: rows and failures go to the standard output, all else to the standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    stand_in_for("sae")

    def tell(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        context = Context(
            device="cpu" if arguments.dry_run else "cuda",
            dry=arguments.dry_run,
            seconds=arguments.seconds,
            folder=Path(folder),
            peers={path.name: path for path in arguments.peers.iterdir()} if arguments.peers else {},
            emit=lambda key, row: tell({"key": key, "row": row}),
            go=sys.stdin.readline,
        )
        try:
            PARTS[arguments.part].run(arguments.part, context)
        except PartSkipped as reason:
            tell({"failure": f"skipped: {reason}"})
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            tell({"failure": f"failed: {type(error).__name__}: {text}"[:300]})
            raise


def install(wheels: Path, target: Path) -> Path:
    """Install every folder of wheels into one of its own; a folder that holds no wheels is used as it is."""
    installing = []
    for folder in filter(Path.is_dir, wheels.iterdir()):
        files = sorted(folder.glob("*.whl"))
        if not files:
            (target / folder.name).symlink_to(folder.resolve())
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(target / folder.name)]
        installing.append((folder.name, subprocess.Popen([*command, *map(str, files)])))
    for name, process in installing:
        if process.wait():
            print(f"{name}: its wheels could not be installed", file=sys.stderr)
    return target


def described_card(arguments: argparse.Namespace) -> tuple[str, dict[str, str | int]]:
    """The card's short name, and what the report begins with."""
    device = "cpu" if arguments.dry_run else "cuda"
    described = report.machine(device)
    if arguments.commit:
        described["commit"] = arguments.commit
    if arguments.dry_run:
        return "dry-run", described
    properties = torch.cuda.get_device_properties(0)
    described["memory"] = f"{properties.total_memory / 1e9:.0f} GB"
    described["cuda"] = str(torch.version.cuda)
    words = re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-").split("-")
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "graphics")), described


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--peers", type=Path, help="folder with a folder of wheels, or of packages, for each toolkit")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="where the report goes")
    parser.add_argument("--commit", help="recorded if this is no checkout")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        work(arguments)
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; --dry-run tries everything on the CPU")
    card, described = described_card(arguments)
    board = Board(f"gpu-{card}", f"On a GPU: {described.get('device', 'dry run, CPU')}", arguments.out, described)
    board.keep_others(arguments.only)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the parts end too
    with tempfile.TemporaryDirectory() as folder:
        if arguments.peers:
            arguments.peers = install(arguments.peers, Path(folder))
        run(arguments, board)
    print((arguments.out / f"{board.name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
