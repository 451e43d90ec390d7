"""Times whole training steps of one toolkit, in that toolkit's own environment; prints one line of JSON.

    python worker.py TOOLKIT ARCHITECTURE D_IN D_SAE K BATCH STEPS SCHEDULE DEVICE

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
from functools import partial

import torch
from data import activations  # pyright: ignore[reportMissingImports]
from steppers import (  # pyright: ignore[reportMissingImports]
    Shape,
    Stepper,
    dictionary_learning,
    llamascopium,
    saelens,
    sparsify,
)

GPU_BLOCK = 20
"""Steps of a peer between two moments at which the clock is read: nothing may wait for it."""


Timed = Callable[[Shape, int, list[torch.Tensor]], list[float]]
"""Shape, number of timed steps, batches → seconds of each."""


class Clocked:
    """Batches over and over; `reads` has the time at which each was asked for."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches, self.reads = batches, list[float]()

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            self.reads.append(time.perf_counter())
            yield batch


def ours(shape: Shape, count: int, data: list[torch.Tensor], products: str = "auto") -> list[float]:
    """`sae.train`, with a step's share of the log, to which it writes every fifty steps by default.

    On a GPU blocks from one line of the log to the next are timed. On a CPU steps are timed from the request for one
    batch to that for the next, and a fiftieth of what the last line took is added: BatchTopK finds its threshold then.
    """
    import sae
    from sae.config.settings import DictionaryConfig, TrainConfig

    every = TrainConfig().log_every
    steps = every * (count + 1) if shape.on_gpu else count + 2
    settings = TrainConfig(tokens=steps * shape.batch, batch_size=shape.batch, encoder_dtype=products)  # type: ignore[arg-type]
    dictionary = DictionaryConfig(architecture=shape.architecture, d_sae=shape.d_sae, k=shape.k)  # type: ignore[arg-type]
    clocked, lines = Clocked(data), list[float]()
    source = sae.IterableSource(clocked)
    clocked.reads.clear()
    sae.train(
        source, dictionary, settings, device=shape.device, progress=lambda *_: lines.append(time.perf_counter())
    )  # fmt: skip
    if shape.on_gpu:
        return [(after - before) / every for before, after in itertools.pairwise(lines)]
    begun = clocked.reads[:steps]
    seconds = [after - before for before, after in itertools.pairwise(begun)][1:]
    line = lines[-1] - begun[-1] - statistics.median(seconds)
    return [step + max(0.0, line) / every for step in seconds]


def peer(make: Callable[[Shape], Stepper]) -> Timed:
    """Another toolkit's step. The first block, which warms up, is left out."""

    def timed(shape: Shape, count: int, data: list[torch.Tensor]) -> list[float]:
        step, numbers = make(shape).step, itertools.count()
        block = GPU_BLOCK if shape.on_gpu else 1
        seconds = []
        for _ in range(count + 1):
            start = time.perf_counter()
            for number in itertools.islice(numbers, block):
                step(number, data[number % len(data)])
            if shape.on_gpu:
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / block)
        return seconds[1:]

    return timed


TOOLKITS: dict[str, tuple[Timed, str]] = {
    "sae": (ours, "sae"),
    "sae, float32": (partial(ours, products="float32"), "sae"),
    "saelens": (peer(saelens), "sae-lens"),
    "saelens, sparse": (peer(partial(saelens, sparse=True)), "sae-lens"),
    "dictionary_learning": (peer(dictionary_learning), "dictionary-learning"),
    "llamascopium": (peer(llamascopium), "llamascopium"),
    "sparsify": (peer(sparsify), "eai-sparsify"),
    "sparsify, float32": (peer(partial(sparsify, products=torch.float32)), "eai-sparsify"),
    "sparsify, Adam": (peer(partial(sparsify, adam=True)), "eai-sparsify"),
    "sparsify, Adam, float32": (peer(partial(sparsify, products=torch.float32, adam=True)), "eai-sparsify"),
}


def main() -> None:
    toolkit, architecture, d_in, d_sae, k, batch, steps, schedule, device = sys.argv[1:]
    shape = Shape(architecture, int(d_in), int(d_sae), int(k), int(batch), int(schedule), device)
    torch.manual_seed(0)
    function, package = TOOLKITS[toolkit]
    data = [x.to(device) for x in activations(2, shape.batch, shape.d_in)]
    seconds = function(shape, int(steps), data)
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
