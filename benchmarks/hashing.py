"""Hashing of the toolkit's files beside plain SHA-256 of the same bytes, with as many threads; prints the ratios.

    python benchmarks/hashing.py [--megabytes 800] [--turns 9]

The files lie in the page cache: of a slow disk both wait for the disk. The two take turns at being first.
"""  # fmt: skip

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sae.files import digest

FILES = 4


def plain(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 18):
            whole.update(piece)
    return whole.hexdigest()


def ours(path: Path) -> str:
    """As for a file that this process has not read."""
    digest._KNOWN.clear()
    return digest.sha256_of(path)


def seconds(compute: Callable[[Path], str], files: list[Path], threads: int) -> float:
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(compute, files))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.bin" for number in range(FILES)]
        for file in files:
            file.write_bytes(os.urandom(1 << 20) * (arguments.megabytes // FILES))
        assert all(plain(file) == ours(file) for file in files)
        for threads in (1, 2):
            ratios = []
            for turn in range(arguments.turns):
                order = (plain, ours) if turn % 2 else (ours, plain)
                took = {compute: seconds(compute, files, threads) for compute in order}
                ratios.append(took[plain] / took[ours])
            print(
                f"{threads} threads: {statistics.median(ratios):.2f} times the speed of plain SHA-256 "
                f"({min(ratios):.2f} to {max(ratios):.2f}, {arguments.turns} turns)"
            )


if __name__ == "__main__":
    main()
