"""What the feature pass costs beside encoding, and beside the pass of another checkout.

    python benchmarks/features.py [--before CHECKOUT] [--device cuda]

The pass over all features of a dictionary (counts, histograms, strongest activations and random samples with windows):

- beyond encoding: the dictionary gives codes made beforehand, in which each document has features of its own, some of
  them far more often than others, and the cache's activations have few numbers;
- the whole pass, on random activations and directions;
- encoding alone: the same tokens read and encoded, and nothing done with the codes.

Each checkout runs in a process of its own; they take turns, and the table has the medians. On a CPU in seconds of
processor time, all threads together, so that what else the machine does in the meantime counts little; on a GPU in
seconds. Every token is eligible but the first of each context.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import report
import torch
from harvest import HOOK, write_synthetic_cache

from sae.activations import ActivationCache
from sae.architectures import ReLU, TopK
from sae.config.settings import FeaturesConfig
from sae.config.splits import TRAIN
from sae.dictionary.base import Codes, Dictionary
from sae.features.collection import scan
from sae.training.initialise import initialise_

WHAT = {"replay": "beyond encoding", "whole": "the whole pass", "encode": "encoding alone"}
DOCUMENT, OWN_FEATURES = 300, 400
FEW = 8


@dataclass(frozen=True)
class Job:
    """One timing: `replay`, `whole` or `encode`, of TopK with this k or of ReLU with this L0."""

    what: str
    folder: str
    d_sae: int
    architecture: str
    k: int
    device: str


class Replayed(TopK):
    """Gives codes made beforehand, in the order of tokens."""

    codes: Codes
    position = 0

    def encode_sparse(self, x: torch.Tensor) -> Codes:
        self.position += len(x)
        return self.codes[self.position - len(x) : self.position]

    def encode_pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, indices = self.encode_sparse(x)
        row = torch.arange(len(x), device=values.device).repeat_interleave(values.shape[1])
        return row, indices.flatten(), values.flatten()


def clustered_codes(tokens: int, d_sae: int, k: int) -> Codes:
    """k features a token, of those of its document; how often a feature is drawn for one falls off as a power law."""
    random = np.random.default_rng(0)
    popularity = -0.6 * np.log(random.permutation(d_sae) + 20.0)
    own = min(d_sae, max(OWN_FEATURES, 4 * k))
    indices = np.empty((tokens, k), dtype=np.int64)
    for start in range(0, tokens, DOCUMENT):
        rows = indices[start : start + DOCUMENT]
        topic = np.argpartition(-popularity - random.gumbel(size=d_sae), own - 1)[:own]
        drawn = random.gumbel(size=(len(rows), own)) + 0.7 * random.gumbel(size=own)
        rows[:] = topic[np.argpartition(-drawn, k, axis=1)[:, :k]]
    scale = np.exp(0.3 * random.standard_normal(d_sae, dtype=np.float32))
    values = np.exp(0.7 * random.standard_normal((tokens, k), dtype=np.float32)) * scale[indices]
    return Codes(torch.from_numpy(values), torch.from_numpy(indices))


def dictionary(job: Job, d_in: int) -> Dictionary:
    """Random unit directions; on random activations a ReLU fires on about k features a token."""
    made = TopK(d_in, job.d_sae, k=job.k) if job.architecture == "topk" else ReLU(d_in, job.d_sae)
    generator = torch.Generator().manual_seed(0)
    initialise_(made, torch.randn(64, d_in, generator=generator), generator)
    with torch.no_grad():
        made.b_dec.zero_()
        if job.architecture == "relu":
            made.b_enc.fill_(-statistics.NormalDist().inv_cdf(1 - job.k / job.d_sae))
    return made.eval().requires_grad_(False).to(job.device)


@torch.no_grad()
def encode(made: Dictionary, cache: ActivationCache) -> None:
    at_once = max(1, (1 << 26) // (made.d_sae * cache.context_length))  # as the pass itself does
    for batch in cache.contexts(TRAIN, HOOK, batch_contexts=at_once):
        x = cast(torch.Tensor, batch.activations).flatten(0, 1)[batch.eligible.flatten()]
        made.encode_sparse(x.to(made.W_enc.device))


def work() -> None:
    """Do jobs from standard input; print the seconds of each."""
    prepared: dict[Job, tuple[ActivationCache, Dictionary]] = {}
    for line in sys.stdin:
        job = Job(**json.loads(line))
        if job not in prepared:
            cache = ActivationCache(job.folder)
            for name in cache.manifest.files:  # into the page cache
                (cache.path / name).read_bytes()
            if job.what == "replay":
                made = Replayed(cache.d_in(HOOK), job.d_sae, k=job.k).requires_grad_(False).to(job.device)
                codes = clustered_codes(cache.rows(TRAIN), job.d_sae, job.k)
                made.codes = Codes(codes.values.to(job.device), codes.indices.to(job.device))
            else:
                made = dictionary(job, cache.d_in(HOOK))
            prepared = {job: (cache, made)}
        cache, made = prepared[job]
        if isinstance(made, Replayed):
            made.position = 0
        clock = time.process_time if job.device == "cpu" else time.perf_counter
        start = clock()
        if job.what == "encode":
            encode(made, cache)
        else:
            scan(made, cache, FeaturesConfig(), HOOK)
        if job.device != "cpu":
            torch.cuda.synchronize()
        print(clock() - start, flush=True)


class Worker:
    """A process with a checkout's package."""

    def __init__(self, checkout: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, __file__, "--work"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def seconds(self, job: Job) -> float:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(asdict(job)) + "\n")
        stdin.flush()
        return float(stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--shapes", nargs="+", default=["768:24576", "576:4608"], help="D_IN:D_SAE")
    parser.add_argument("--codes", nargs="+", default=["topk:32", "relu:200"], help="ARCHITECTURE:L0")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--tokens", type=int, default=1_048_576, help="of the pass beyond encoding")
    parser.add_argument("--encoded-tokens", type=int, default=65_536, help="of the whole pass, and of encoding alone")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="features-cpu", help="of the files in docs/results/")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    workers = {"after": Worker(Path(__file__).parents[1])}
    if arguments.before is not None:
        workers = {"before": Worker(arguments.before.resolve()), **workers}
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes:
        d_in, d_sae = map(int, shape.split(":"))
        for what in arguments.what:
            tokens = arguments.tokens if what == "replay" else arguments.encoded_tokens
            with tempfile.TemporaryDirectory() as folder:
                write_synthetic_cache(Path(folder), tokens, FEW if what == "replay" else d_in)
                for codes in arguments.codes:
                    architecture, k = codes.split(":")
                    job = Job(what, folder, d_sae, architecture, int(k), arguments.device)
                    seconds: dict[str, list[float]] = {name: [] for name in workers}
                    for turn in range(arguments.turns + 1):  # the first warms up
                        for name, worker in workers.items():
                            second = worker.seconds(job)
                            seconds[name] += [second] if turn else []
                    medians = {name: statistics.median(values) for name, values in seconds.items()}
                    described = {name: value for name, value in asdict(job).items() if name != "folder"}
                    rows.append({**described, "d_in": d_in, "tokens": tokens, "seconds": medians})
                    print(rows[-1], file=sys.stderr, flush=True)
    title = f"The feature pass, {'CPU' if arguments.device == 'cpu' else 'GPU'}"
    report.write(arguments.name, title, table(rows), {"rows": rows}, report.machine(arguments.device))


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "dictionary",
        "what",
        "tokens",
        *(f"{name}, s" for name in rows[0]["seconds"]),
        "tokens/s",
        "before ÷ after",
    ]
    cells = []
    for row in rows:
        after, before = row["seconds"]["after"], row["seconds"].get("before")
        cells.append([
            f"{row['d_in']} → {row['d_sae']:,}, {row['architecture']}, L0 {row['k']}", WHAT[row["what"]],
            f"{row['tokens']:,}", *(f"{value:.2f}" for value in row["seconds"].values()),
            f"{row['tokens'] / after:,.0f}", "–" if before is None else f"{before / after:.2f}",
        ])  # fmt: skip
    return report.table(head, cells, left=2)


if __name__ == "__main__":
    main()
