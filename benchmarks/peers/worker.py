"""Times whole training steps of one toolkit, in that toolkit's own environment; prints one line of JSON.

    python worker.py TOOLKIT ARCHITECTURE D_IN D_SAE K BATCH STEPS DEVICE

Each toolkit is used as its users use it: its own trainer's step with its default options, which is forward, losses,
backward, clipping or projection, optimiser, schedule and the record of dead features. Of this package the whole of
`sae.train` is timed: input, normalisation and logging too.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from data import activations  # pyright: ignore[reportMissingImports]
from steppers import (  # pyright: ignore[reportMissingImports]
    Shape,
    Stepper,
    dictionary_learning,
    saelens,
    sparsify,
)

GPU_BLOCK = 20


@dataclass(frozen=True)
class Task:
    """What is to be trained and timed."""

    architecture: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int
    device: str

    @property
    def block(self) -> int:
        """Steps between two moments at which the clock is read: on a GPU some, so that nothing waits for it."""
        return 1 if self.device == "cpu" else GPU_BLOCK

    def time(self, step: Callable[[int, torch.Tensor], object], data: list[torch.Tensor]) -> list[float]:
        """Seconds per step of every block; the first block, which warms up, is left out."""
        seconds = []
        for block in range(self.steps + 1):
            start = time.perf_counter()
            for inner in range(self.block):
                number = block * self.block + inner
                step(number, data[number % len(data)])
            if self.device != "cpu":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / self.block)
        return seconds[1:]


class Clocked:
    """Batches over and over; `reads` has the time at which each was asked for."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches, self.reads = batches, list[float]()

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            self.reads.append(time.perf_counter())
            yield batch


def ours(task: Task, data: list[torch.Tensor], products: str = "float32") -> list[float]:
    """`sae.train`, with a step's share of the log, to which it writes every fifty steps by default.

    On a GPU blocks from one line of the log to the next are timed. On a CPU steps are timed from the request for one
    batch to that for the next, and a fiftieth of what the last line took is added: BatchTopK finds its threshold then.
    """
    import sae
    from sae.config.settings import DictionaryConfig, TrainConfig

    every = TrainConfig().log_every
    steps = task.steps + 2 if task.device == "cpu" else every * (task.steps + 1)
    settings = TrainConfig(tokens=steps * task.batch, batch_size=task.batch, encoder_dtype=products)  # type: ignore[arg-type]
    shape = DictionaryConfig(architecture=task.architecture, d_sae=task.d_sae, k=task.k)  # type: ignore[arg-type]
    clocked, lines = Clocked(data), list[float]()
    source = sae.IterableSource(clocked)
    clocked.reads.clear()
    sae.train(
        source, shape, settings, device=task.device, progress=lambda *_: lines.append(time.perf_counter())
    )  # fmt: skip
    if task.device != "cpu":
        return [(after - before) / every for before, after in itertools.pairwise(lines)]
    begun = clocked.reads[:steps]
    seconds = [after - before for before, after in itertools.pairwise(begun)][1:]
    line = lines[-1] - begun[-1] - statistics.median(seconds)
    return [step + max(0.0, line) / every for step in seconds]


def ours_bfloat16(task: Task, data: list[torch.Tensor]) -> list[float]:
    """The same with the encoder's product in bfloat16; the weights stay float32."""
    return ours(task, data, "bfloat16")


def peer(make: Callable[[Shape], Stepper]) -> Callable[[Task, list[torch.Tensor]], list[float]]:
    """Another toolkit's step, with schedules of ten thousand steps."""

    def timed(task: Task, data: list[torch.Tensor]) -> list[float]:
        shape = Shape(task.architecture, task.d_in, task.d_sae, task.k, task.batch, 10_000, task.device)
        return task.time(make(shape).step, data)

    return timed


TOOLKITS = {
    "sae": (ours, "sae"),
    "sae, bfloat16 products": (ours_bfloat16, "sae"),
    "saelens": (peer(saelens), "sae-lens"),
    "dictionary_learning": (peer(dictionary_learning), "dictionary-learning"),
    "sparsify": (peer(sparsify), "eai-sparsify"),
    "sparsify, float32": (peer(partial(sparsify, products=torch.float32)), "eai-sparsify"),
    "sparsify, Adam": (peer(partial(sparsify, adam=True)), "eai-sparsify"),
    "sparsify, Adam, float32": (peer(partial(sparsify, products=torch.float32, adam=True)), "eai-sparsify"),
}


def main() -> None:
    toolkit, architecture, d_in, d_sae, k, batch, steps, device = sys.argv[1:]
    task = Task(architecture, int(d_in), int(d_sae), int(k), int(batch), int(steps), device)
    torch.manual_seed(0)
    function, package = TOOLKITS[toolkit]
    data = [x.to(device) for x in activations(2, task.batch, task.d_in)]
    seconds = function(task, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "seconds": seconds,
        "peak_bytes": peak if device == "cpu" else torch.cuda.max_memory_allocated(),
        "version": importlib.metadata.version(package),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
