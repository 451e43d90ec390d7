"""Speed of loading, next to what this machine can do at most.

    python benchmarks/loader.py --folder FOLDER

Rows per second that `ActivationLoader` gives, shuffled over tokens, from a synthetic float16 cache of width 768; on one
core and on two, in turns with the floor:

- warm: the files are in the page cache. Floor: `index_select` of the same rows, in the same batches, from memory.
  Targets on one core: at least 0.6 of it, and 1.8 million rows per second.
- cold: the files are dropped from the page cache before each epoch. Floor: reading the same files in order, after they
  were dropped too, now before the epoch and now after it. Target: at least 0.9 of it.
- first epoch: the files are in the page cache, but have not been compared with their hashes in this process yet.

Cold and first epochs count from the start of an iteration, warm ones later. In cold ones the hashes are known already.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harvest import HOOK, describe_machine, write_synthetic_cache

from sae.activations import ActivationCache
from sae.activations.loader import ActivationLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=524_288, help="rows of the synthetic cache")
    parser.add_argument("--pool-tokens", type=int, default=131_072, help="rows shuffled together")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; the cache in it is used again")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        print(json.dumps(measured(a)))
        return
    print(describe_machine())
    with contextlib.ExitStack() as stack:
        folder = a.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "manifest.json").is_file():
            write_synthetic_cache(folder, a.rows)
            os.sync()
        for cores in a.cores:
            print(f"\n{cores} core{'s' * (cores > 1)}")
            for name, (ours, floor, ratio) in on_cores(cores, folder, a).items():
                beside = f"   floor {floor / 1e6:6.3f}   ratio {ratio:.2f}" if floor else ""
                print(f"{name:>22}  {ours / 1e6:6.3f} M rows/s{beside}")


def on_cores(cores: int, folder: Path, a: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """The measurements of a process of its own, which has so many cores."""
    command = [
        sys.executable, __file__, "--worker", "--folder", str(folder), "--cores", str(cores), "--turns", str(a.turns),
        "--pool-tokens", str(a.pool_tokens), "--batch-size", str(a.batch_size),
    ]  # fmt: skip
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    limits = {**os.environ, "OMP_NUM_THREADS": str(len(allowed)), "MKL_NUM_THREADS": str(len(allowed))}
    printed = subprocess.run(
        command, env=limits, check=True, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    ).stdout  # fmt: skip
    return json.loads(printed.splitlines()[-1])


def measured(a: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """Rows per second of the loader and of the floor, medians over the turns; and the median of the turns' ratios."""
    torch.set_num_threads(a.cores[0])

    def opened() -> ActivationLoader:
        cache = ActivationCache(a.folder)
        return ActivationLoader(cache, HOOK, batch_size=a.batch_size, pool_tokens=a.pool_tokens)

    loader = opened()
    files = [loader.cache.path / name for name in loader.cache.manifest.files if name.startswith(HOOK)]
    in_order(files)
    first = epoch(loader)
    loader.restart()
    steady = Steady(loader)
    warm = [(steady.rate(), floor) for floor in from_memory(loader, a.turns)]
    rows = loader.cache.rows()
    del loader, steady
    gc.collect()  # what is mapped is not dropped from the page cache
    cold = []
    for turn in range(a.turns):
        pair = {}
        for what in ("ours", "floor") if turn % 2 else ("floor", "ours"):  # the disk remembers what was read before
            time.sleep(0.5)  # the pool that is being read is complete
            drop(files)
            pair[what] = epoch(opened()) if what == "ours" else rows / seconds(lambda: in_order(files))
            gc.collect()
        cold.append((pair["ours"], pair["floor"]))
    return {"first epoch": (first, 0, 0), "warm": medians(warm), "cold": medians(cold)}


def medians(turns: list[tuple[float, float]]) -> tuple[float, float, float]:
    ours, floors = zip(*turns, strict=True)
    return (
        statistics.median(ours), statistics.median(floors),
        statistics.median(one / floor for one, floor in turns),
    )  # fmt: skip


def epoch(loader: ActivationLoader) -> float:
    """Rows per second of an epoch, from the first request on."""
    loader.restart()
    count = (loader.tokens_per_epoch or 0) // loader.batch_size

    def read() -> None:
        for _ in itertools.islice(loader, count):
            pass

    return count * loader.batch_size / seconds(read)


class Steady:
    """An iteration whose pools are in use and being read."""

    def __init__(self, loader: ActivationLoader) -> None:
        self.loader, self.batches = loader, iter(loader)
        self.pools = (len(plan.places) for plan in loader.order.plans(0, loader.streams))
        self.end = 0
        self._pass(3)

    def rate(self) -> float:
        """Rows per second of about an epoch; at its start the next pool has just been begun, and at its end too."""
        time.sleep(0.5)  # the pool that is being read is complete
        self._pass(1)
        before, pools = self.loader.position, -(-self.loader.order.tokens_per_epoch // self.loader.pool_tokens)
        spent = seconds(lambda: self._pass(pools))
        return (self.loader.position - before) / spent

    def _pass(self, pools: int) -> None:
        """Go on until rows of the pool after the next few have been given."""
        for _ in range(pools):
            self.end += next(self.pools)
            while self.loader.position <= self.end:
                next(self.batches)


def from_memory(loader: ActivationLoader, turns: int) -> Iterator[float]:
    """Rows per second of `index_select` of an epoch's rows from one tensor in memory."""
    cache = loader.cache
    shards = [cache.activation_shard(HOOK, "train", number)[0] for number in range(cache.shards())]
    memory = torch.cat(shards)
    starts = [0, *itertools.accumulate(map(len, shards))]
    rows = []
    for plan in loader.order.plans(0, loader.streams):
        stored = torch.cat([torch.from_numpy(rows) + starts[n] for n, rows in loader.order.reads(plan)])
        rows.append(torch.empty_like(stored).index_copy_(0, plan.places, stored))
        if sum(map(len, rows)) >= loader.order.tokens_per_epoch:
            break
    batches = torch.cat(rows).split(loader.batch_size)

    def gather() -> None:
        for batch in batches:
            memory.index_select(0, batch)

    gather()
    for _ in range(turns):
        time.sleep(0.5)  # a pool that is being read is complete
        yield sum(map(len, batches)) / seconds(gather)


def in_order(files: list[Path]) -> None:
    """Read files from beginning to end."""
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
