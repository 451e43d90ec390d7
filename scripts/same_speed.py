"""Whether a training step, a harvest and an evaluation take as long as in another checkout.

    python scripts/same_speed.py OTHER [--pairs 20] [--jobs harvest evaluation]

OTHER is another checkout, such as one made by `git worktree add ../before COMMIT`; it is compared with this one, both
run by this Python. Each has a process of its own, which stays open; the two do each job in turns, and begin in turns.
Printed are the median of the ratios (this checkout to the other) and its 95 % interval, from 10,000 resamples of the
pairs, and the same for the other checkout against itself, which shows what the machine contributes.

The jobs: a step of TopK, BatchTopK and ReLU, 768 → 6,144, k 32, 2,048 rows; a harvest of 60,000 tokens by the demo
model; the evaluation of a dictionary on 20,000 held-out tokens, with losses of the language model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
STEPS, ROWS, D_IN, D_SAE, K = 8, 2048, 768, 6144, 32
SETTINGS = (
    "data.source=stdlib", "data.tokens=40000", "data.held_out_tokens=20000", "data.context_length=128", "device=cpu",
    "dictionary.d_sae=1024", "dictionary.k=16", "train.batch_size=512", "train.pool_tokens=8192",
)  # fmt: skip
JOBS = ("step of TopK", "step of BatchTopK", "step of ReLU", "harvest", "evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        serve(Path(arguments.work))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {"this": HERE, "other": arguments.other.resolve(), "other again": arguments.other.resolve()}
        workers = {name: Worker(code, Path(folder, name.replace(" ", "-"))) for name, code in checkouts.items()}
        print(
            "| job | ms, other | this ÷ other | 95 % | other ÷ itself | 95 % |\n|---|--:|--:|---|--:|---|", flush=True
        )
        for job in arguments.jobs:
            times = timed(workers, job, arguments.pairs)
            columns = [f"{statistics.median(times['other']) * 1000:,.0f}"]
            for name in ("this", "other again"):
                ratios = [one / other for one, other in zip(times[name], times["other"], strict=True)]
                low, high = interval(ratios)
                columns += [f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"]
            print(f"| {job} | {' | '.join(columns)} |", flush=True)
        for worker in workers.values():
            worker.close()


def timed(workers: dict[str, Worker], job: str, pairs: int) -> dict[str, list[float]]:
    """Seconds of each worker, `pairs` times, in an order that changes from time to time."""
    names = list(workers)
    for worker in workers.values():
        worker.seconds(job)  # not counted: it loads what the others find loaded
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(pairs):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(workers[name].seconds(job))
    return times


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median, from resamples."""
    generator = random.Random("ratios")
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return medians[250], medians[9749]


class Worker:
    """A process with one checkout's package loaded."""

    def __init__(self, code: Path, work: Path) -> None:
        work.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, ".", "--work", str(work)], cwd=work, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        if Path(self._answer()["package"]).resolve() != (code / "sae").resolve():
            sys.exit(f"{code}: another package was imported")

    def seconds(self, job: str) -> float:
        """Do a job."""
        assert self.process.stdin is not None
        print(job, file=self.process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit("a worker ended; run this script with --work FOLDER in its checkout to see why")


def serve(work: Path) -> None:
    """Do the jobs whose names are read, and print their seconds."""
    import sae

    print(json.dumps({"package": str(Path(sae.__file__).parent)}), flush=True)
    jobs: dict[str, Callable[[], float]] = {
        "step of TopK": lambda: steps("topk"),
        "step of BatchTopK": lambda: steps("batch_topk"),
        "step of ReLU": lambda: steps("relu"),
        "harvest": lambda: harvest(work),
        "evaluation": lambda: evaluation(work),
    }
    for line in sys.stdin:
        print(json.dumps({"seconds": jobs[line.strip()]()}), flush=True)


def steps(architecture: str) -> float:
    """Seconds of a step: of the last of a training, after some that are not counted."""
    import torch

    import sae

    rows = torch.randn(4, ROWS, D_IN, generator=torch.Generator().manual_seed(0))
    dictionary = sae.DictionaryConfig.model_validate({"architecture": architecture, "d_sae": D_SAE, "k": K})
    moments: list[float] = []
    settings = sae.TrainConfig(tokens=STEPS * ROWS, batch_size=ROWS, log_every=1)
    sae.train(
        sae.IterableSource(list(rows)), dictionary, settings,
        progress=lambda done, total, metrics: moments.append(time.perf_counter()),
    )  # fmt: skip
    return statistics.median(after - before for before, after in pairwise(moments[2:]))


def harvest(work: Path) -> float:
    """Seconds of a harvest into a new folder."""
    import shutil

    import sae

    folder = work / "activations"
    shutil.rmtree(folder, ignore_errors=True)
    config = sae.load_config(None, [*SETTINGS, f"out={work / 'run'}", f"harvest.cache={folder}"])
    start = time.perf_counter()
    sae.harvest(config)
    return time.perf_counter() - start


_READY: dict[str, Any] = {}


def evaluation(work: Path) -> float:
    """Seconds of the evaluation of a dictionary that is trained the first time."""
    import sae

    if not _READY:
        harvest(work)
        cache = sae.ActivationCache(work / "activations")
        source = sae.ActivationLoader(cache, cache.hooks[0], batch_size=512)
        _READY["dictionary"] = sae.train(source, sae.DictionaryConfig(d_sae=1024, k=16), sae.TrainConfig(tokens=20_480))
        _READY["cache"] = cache
        _READY["language_model"] = sae.LanguageModel(sae.ModelConfig(name="demo"))
    cache = _READY["cache"]
    start = time.perf_counter()
    sae.evaluate(_READY["dictionary"], cache, hook=cache.hooks[0], language_model=_READY["language_model"])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
