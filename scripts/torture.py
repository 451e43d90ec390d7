"""Kills harvests and trainings of the demo model with SIGKILL, flips a byte, fills a disk; checks that nothing is lost.

    python scripts/torture.py [--kills 10]

The full disk needs root: it is a small tmpfs. A few minutes on two cores.
"""  # fmt: skip

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "data.tokens=400000", "data.held_out_tokens=20000", "harvest.shard_contexts=64", "dictionary.d_sae=1024",
    "train.checkpoint_every=20", "train.tokens=1200000", "train.dead_after_tokens=50000",
]  # fmt: skip


def sae(verb: str, out: Path, *settings: str) -> list[str]:
    config = str(ROOT / "configs" / "quickstart.yaml")
    return [sys.executable, "-m", "sae.cli.main", "--quiet", verb, config, f"out={out}", *SETTINGS, *settings]


def seconds(command: list[str]) -> float:
    started = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.time() - started


def digests(folder: Path, pattern: str) -> dict[str, str]:
    files = sorted(path for path in folder.rglob(pattern) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_at_random(command: list[str], kills: int, idle: float, busy: float, rng: random.Random) -> int:
    """Start the command `kills` times and kill each at a random moment; how many were still running.

    Args:
        idle: seconds the command takes where there is nothing left to do.
        busy: seconds that its work takes; a kill comes within the first fifth of it, so that ten fit before the end.
    """
    hit = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(idle + rng.uniform(0, 0.2 * busy))
        hit += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    return hit


def verdict(name: str, passed: bool, detail: str) -> bool:
    print(f"{'PASS' if passed else 'FAIL'}  {name}: {detail}", flush=True)
    return passed


def harvest_and_training(work: Path, kills: int, rng: random.Random) -> bool:
    whole, parts = work / "whole", work / "parts"
    results = []
    for verb, folder, pattern in (("harvest", "activations", "*"), ("train", "dictionary", "weights.safetensors")):
        took, idle = seconds(sae(verb, whole)), seconds(sae(verb, whole))
        hit = kill_at_random(sae(verb, parts), kills, idle, took - idle, rng)
        subprocess.run(sae(verb, parts), check=True, stdout=subprocess.DEVNULL)
        expected, found = digests(whole / folder, pattern), digests(parts / folder, pattern)
        same = expected == found and bool(expected)
        results.append(verdict(verb, same, f"{hit} of {kills} kills hit; {len(found)} files byte-identical: {same}"))
    return all(results)


def flipped_byte(work: Path) -> bool:
    shard = work / "whole" / "activations" / "blocks.2.hook_resid_pre" / "train-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    command = [sys.executable, "-m", "sae.cli.main", "verify", str(work / "whole")]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    named = "train-00003.safetensors" in outcome.stderr and outcome.returncode == 1
    return verdict("flipped byte", named, outcome.stderr.splitlines()[0])


def full_disk(work: Path) -> bool:
    """A harvest onto a tmpfs that a second process fills meanwhile; then room is made, and the harvest resumes."""
    disk = work / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=240m", "tmpfs", str(disk)], check=True)
    try:
        small = subprocess.run(
            sae("harvest", disk / "big", "data.tokens=1000000"), capture_output=True, text=True, check=False
        )
        refused = small.returncode == 1 and "disk full" in small.stderr
        first = verdict("disk too small from the start", refused, small.stderr.strip())
        subprocess.run(["rm", "-rf", str(disk / "big")], check=True)
        process = subprocess.Popen(sae("harvest", disk / "run"), stderr=subprocess.PIPE, text=True)
        while not list(disk.glob("run/activations/blocks*/train-00002*")) and process.poll() is None:
            time.sleep(0.05)
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(max(free.f_bavail * free.f_frsize - 6_000_000, 0)))
        _, message = process.communicate()
        stopped = process.returncode == 1 and "disk full" in message and len(message.strip().splitlines()) == 1
        second = verdict("disk full in the middle", stopped, message.strip())
        (disk / "filler").unlink()
        subprocess.run(sae("harvest", disk / "run"), check=True, stdout=subprocess.DEVNULL)
        same = digests(disk / "run" / "activations", "*") == digests(work / "parts" / "activations", "*")
        return verdict("resumed with room", same, f"byte-identical: {same}") and first and second
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        results = [harvest_and_training(work, arguments.kills, random.Random(arguments.seed)), flipped_byte(work)]
        if os.geteuid() == 0:
            results.append(full_disk(work))
        else:
            print("SKIP  full disk: needs root")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
