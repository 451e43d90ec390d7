"""Whether two checkouts make the same dictionaries, bit for bit, and measure the same of them, number by number.

    python scripts/same_results.py OTHER [--work FOLDER] [--quick]

OTHER is another checkout, such as one made by `git worktree add ../before COMMIT`; it is compared with this one, both
run by this Python. Each harvests the demo model's activations, and trains six architectures with two seeds in three
ways: a run each, one sweep, and a run that is killed after a checkpoint and resumed. Compared are the shards, all
weights, eval.json, effects.json, probe.json and superposition.json, without versions, times and keys of the
checkouts' own. `--quick`: two architectures and one seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("relu", "gated", "topk", "batch_topk", "jumprelu", "matryoshka")
SETTINGS = (
    "data.source=stdlib", "data.tokens=60000", "data.held_out_tokens=6000", "data.context_length=64",
    "dictionary.d_sae=256", "dictionary.k=8", "train.batch_size=512", "train.pool_tokens=8192",
    "evaluation.frozen_decoder_tokens=8000", "features.tokens=20000", "device=cpu",
)  # fmt: skip
OWN = {"sae_version", "seconds", "key", "identity", "made_by", "bytes", "tokens_per_second"}
"""Entries that name the package or the time, not a result."""
RENAMED = {"world": "kind"}
"""Entries that older commits call by another name."""
LABELLED = 240
PATIENCE_SECONDS = 300.0


class Checkout:
    """A checkout, and a folder for what it makes."""

    def __init__(self, code: Path, work: Path) -> None:
        self.code, self.work = code, work
        work.mkdir(parents=True)

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin a command."""
        environment = {**os.environ, "PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1"}
        code = "from sae.__main__ import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, "--quiet", *words], cwd=self.work, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def sae(self, *words: str) -> None:
        """Run a command to its end."""
        process = self.start(*words)
        _, errors = process.communicate()
        if process.returncode:
            sys.exit(f"{self.code}: sae {' '.join(words)}\n{errors.decode(errors='replace')}")

    def make(self, architectures: tuple[str, ...], seeds: tuple[int, ...]) -> None:
        """Everything that is compared."""
        (self.work / "empty.yaml").write_text("{}\n")  # older commits need a file
        common = [*SETTINGS, "harvest.cache=activations"]
        self.sae("harvest", "empty.yaml", "out=harvest", *common)
        for architecture in architectures:
            for seed in seeds:
                own = [*common, f"dictionary.architecture={architecture}", f"seed={seed}"]
                self.sae("run", "empty.yaml", f"out=run-{architecture}-{seed}", *own)
                self.resumed(f"resumed-{architecture}-{seed}", own)
        self.sae(
            "sweep", "empty.yaml", "out=sweep", *common, f"sweep.dictionary.architecture=[{','.join(architectures)}]",
            f"sweep.seed=[{','.join(map(str, seeds))}]",
        )  # fmt: skip
        first = f"run-{architectures[0]}-{seeds[0]}"
        self.sae("effects", first, "--features", "12", "--positions", "8")
        rows = [f'"line {number} of {"code" if number % 2 else "text"}",{number % 2}' for number in range(LABELLED)]
        (self.work / "labelled.csv").write_text("\n".join(["text,label", *rows]) + "\n")
        self.sae("probe", first, "labelled.csv", "examples=120", "splits=2", "k=[1, 4]")
        self.sae("superposition", "geometry", "--out", "superposition")

    def resumed(self, out: str, settings: list[str]) -> None:
        """A training that is killed as soon as there is a checkpoint, and then goes on."""
        words = ["train", "empty.yaml", f"out={out}", *settings, "train.checkpoint_every=20"]
        process, began = self.start(*words), time.monotonic()
        while not list((self.work / out / "checkpoints").glob("step-*")) and process.poll() is None:
            if time.monotonic() - began > PATIENCE_SECONDS:
                sys.exit(f"{self.code}: no checkpoint in {out}")
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.sae(*words)


def results(checkout: Checkout) -> dict[str, Any]:
    """What is compared, by the place of the file: hashes of tensors, and the content of JSON."""
    found: dict[str, Any] = {}
    for path in sorted(checkout.work.rglob("*")):
        name = path.relative_to(checkout.work).as_posix()
        if path.suffix == ".safetensors" and ("activations" in name or path.name == "weights.safetensors"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name in ("eval.json", "effects.json", "probe.json", "superposition.json"):
            found[name] = plain(json.loads(path.read_bytes()))
    return found


def plain(content: Any) -> Any:
    """The content without what names the package or the time."""
    if isinstance(content, dict):
        return {RENAMED.get(key, key): plain(value) for key, value in content.items() if key not in OWN}
    return [plain(value) for value in content] if isinstance(content, list) else content


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two contents differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            line for key in keys for line in differences(one.get(key, "–"), other.get(key, "–"), f"{place}/{key}")
        ]  # fmt: skip
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [line for number, pair in pairs for line in differences(*pair, f"{place}/{number}")]
    return [] if one == other else [f"{place}: {str(one)[:60]} here, {str(other)[:60]} there"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--work", type=Path, help="folder for what is made; it stays; by default a temporary one")
    parser.add_argument("--quick", action="store_true", help="two architectures and one seed")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    try:
        made = {}
        for name, code in (("here", HERE), ("there", arguments.other.resolve())):
            checkout = Checkout(code, work / name)
            checkout.make(ARCHITECTURES[2:4] if arguments.quick else ARCHITECTURES, (0,) if arguments.quick else (0, 1))
            made[name] = results(checkout)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    different = differences(made["here"], made["there"])
    kinds = {"weights": "weights.safetensors", "shards": "activations", "results": ".json"}
    counts = {kind: sum(part in name for name in made["here"]) for kind, part in kinds.items()}
    print("\n".join(different[:40]))
    print(f"{', '.join(f'{count} {kind}' for kind, count in counts.items())}; {len(different)} differences")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
