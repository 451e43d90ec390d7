"""Training while the model runs, compared with its two parts alone, and the memory of a long live training.

    python benchmarks/live.py [--turns 7] [--minutes 30]

In turns, in one process, over the same tokens of the same text: the model alone (its activations dropped), training
alone (from batches in memory), and both as `harvest.live` does it, with one pool per epoch and from pool to pool. The
ratio is live ÷ (model + training), the median over the turns. Target: at most 1.05.

With `--minutes`, one live training of that length instead: the process's resident memory, sampled every second, and the
largest of its last five minutes compared with that of minutes 5 to 10. Target: at most 1.02.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

from report import machine, table, write

import sae
from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.activations.live import LivePass, LiveSource
from sae.config.file import parse_config
from sae.config.settings import RunConfig
from sae.errors import TrainingInterrupted

HOOK = "blocks.2.hook_resid_pre"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--hook", default=HOOK)
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of a turn")
    parser.add_argument("--pool-tokens", type=int, default=16_384)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--minutes", type=float, help="measure the memory of one training of this length")
    parser.add_argument("--name", default="live-cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(arguments, Path(folder))
        language_model = sae.LanguageModel(arguments.model)
        cache = harvest(config, language_model)
        road = Road(config, cache, language_model)
        if arguments.minutes:
            report_memory(road, arguments)
        else:
            report_times(road, arguments)


def settings(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    return parse_config(
        {
            "out": str(folder),
            "device": "cpu",
            "model": {"name": arguments.model},
            "data": {"source": "stdlib", "tokens": arguments.tokens, "held_out_tokens": 2048},
            "harvest": {"hooks": [arguments.hook], "live": True, "sample_tokens": 16_384, "shard_contexts": 128},
            "dictionary": {"d_sae": arguments.d_sae, "k": arguments.k},
            "train": {"batch_size": arguments.batch_size, "pool_tokens": arguments.pool_tokens},
        }
    )


class Road:
    """The model, the training, and the two together, over one epoch of a live cache."""

    def __init__(self, config: RunConfig, cache: ActivationCache, language_model: sae.LanguageModel) -> None:
        self.config, self.cache, self.language_model = config, cache, language_model
        source = self.source()
        self.steps = source.tokens_per_epoch // config.train.batch_size
        self.batches = list(itertools.islice(source, self.steps))

    def source(self) -> LiveSource:
        train, hook = self.config.train, self.config.hook
        live = LivePass(
            self.cache, self.language_model, [hook], batch_size=train.batch_size, pool_tokens=train.pool_tokens
        )
        return live.sources[hook]

    def model(self) -> None:
        source = self.source()
        pools = -(-self.steps * source.batch_size // source.pool_tokens)
        for plan in itertools.islice(source.order.plans(0, source.streams), pools):
            for tokens, _ in source.live.contexts(plan):
                self.language_model.activations(tokens, [source.hook])

    def training(self) -> None:
        self.train(sae.IterableSource(self.batches))

    def live(self) -> None:
        self.train(self.source())

    def train(self, source: LiveSource | sae.IterableSource, tokens: int | None = None) -> None:
        total = tokens or self.steps * self.config.train.batch_size
        sae.train(source, self.config.dictionary, sae.TrainConfig(tokens=total, log_every=10))


def report_times(road: Road, arguments: argparse.Namespace) -> None:
    jobs = {"model": road.model, "training": road.training, "live": road.live}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(arguments.turns + 1):  # the first warms up
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    ratios = [live / (model + training) for model, training, live in zip(*seconds.values(), strict=True)]
    tokens = road.steps * arguments.batch_size
    rows = [
        [name, f"{statistics.median(times):,.2f}", f"{tokens / statistics.median(times):,.0f}"]
        for name, times in seconds.items()
    ]
    text = (
        table(["", "s", "tokens/s"], rows)
        + f"\nlive ÷ (model + training): {statistics.median(ratios):.3f}, turns from {min(ratios):.3f} to "
        f"{max(ratios):.3f}.\n"
    )
    title = f"Live training: {arguments.model}, {arguments.hook}, {arguments.d_sae:,} features, k {arguments.k}"
    write(arguments.name, title, text, {"seconds": seconds, "ratios": ratios, "tokens": tokens}, machine())


def report_memory(road: Road, arguments: argparse.Namespace) -> None:
    samples: list[tuple[float, int]] = []
    begun, end = time.perf_counter(), 60 * arguments.minutes
    page = os.sysconf("SC_PAGE_SIZE")

    def watch() -> None:
        while (now := time.perf_counter() - begun) < end:
            samples.append((now / 60, page * int(Path("/proc/self/statm").read_text().split()[1])))
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    with contextlib.suppress(TrainingInterrupted):
        road.train(road.source(), tokens=10**12)
    early = max(size for minute, size in samples if 5 <= minute < 10)
    late = max(size for minute, size in samples if minute >= arguments.minutes - 5)
    text = (
        f"{arguments.minutes:g} minutes, {len(samples):,} samples. Largest resident memory of minutes 5 to 10: "
        f"{early / 1e6:,.1f} MB; of the last five: {late / 1e6:,.1f} MB; ratio {late / early:.4f}.\n"
    )
    title = f"Memory of a live training: {arguments.model}, {arguments.d_sae:,} features"
    write(arguments.name, title, text, {"early": early, "late": late, "samples": samples[::10]}, machine())


if __name__ == "__main__":
    main()
