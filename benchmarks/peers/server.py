"""Serves one toolkit: makes its dictionaries, times their training steps and scores them, a line of JSON a request.

    python server.py TOOLKIT

It runs in the toolkit's own environment and stays alive, so that toolkits can take turns without being started and
compiled each time. A request is `{"do": "prepare" | "time" | "drop" | "score", "shape": {...}, ...}`, an answer an
object, `{"error": TEXT}` if the request failed. What the toolkit itself prints goes to the standard error.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import itertools
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from absent import stand_in_for  # pyright: ignore[reportMissingImports]
from data import Stream  # pyright: ignore[reportMissingImports]
from environments import PACKAGES  # pyright: ignore[reportMissingImports]
from steppers import (  # pyright: ignore[reportMissingImports]
    Reconstruct,
    Shape,
    Stepper,
    dictionary_learning,
    llamascopium,
    saelens,
    sparsify,
)

PEERS: dict[str, Callable[[Shape], Stepper]] = {
    "sparsify": sparsify,
    "saelens, autocast, compiled": lambda shape: saelens(shape, autocast=True, compiled=True),
    "saelens, sparse, autocast, compiled": lambda shape: saelens(shape, sparse=True, autocast=True, compiled=True),
    "dictionary_learning, autocast": lambda shape: dictionary_learning(shape, autocast=True),
    "llamascopium, Triton": lambda shape: llamascopium(shape, triton=True),
}
INPUTS = 8
"""Batches that a timing goes round: several times the cache of a GPU."""
HELD_OUT = 1 << 21
"""Number of the first batch that no training comes to."""


class EnoughTimed(Exception):  # noqa: N818
    """The timing has run as long as it should."""


class Peer:
    """Another toolkit."""

    def __init__(self, make: Callable[[Shape], Stepper]) -> None:
        self.make = make
        self.made: dict[Shape, tuple[Stepper, Iterator[int]]] = {}
        self.bytes: dict[Shape, int] = {}

    def prepare(self, shape: Shape, inputs: list[torch.Tensor]) -> None:
        """Build, and take the steps that compile."""
        before = allocated(shape)
        stepper, numbers = self.make(shape), itertools.count()
        for number in itertools.islice(numbers, 3):
            stepper.step(number, inputs[number % INPUTS])
        self.made[shape], self.bytes[shape] = (stepper, numbers), allocated(shape) - before

    def others(self, shape: Shape) -> int:
        """Bytes of dictionaries of other shapes, which wait for their turn."""
        return sum(size for other, size in self.bytes.items() if other != shape)

    def time(self, shape: Shape, inputs: list[torch.Tensor], seconds: float) -> list[float]:
        """Seconds per step of five blocks of steps."""
        stepper, numbers = self.made[shape]

        def block(count: int) -> float:
            synchronise(shape)
            start = time.perf_counter()
            for number in itertools.islice(numbers, count):
                stepper.step(number, inputs[number % INPUTS])
            synchronise(shape)
            return (time.perf_counter() - start) / count

        block(2)
        count = min(50, max(1, int(seconds / 5 / block(2))))
        return [block(count) for _ in range(5)]

    def drop(self, shape: Shape) -> None:
        self.made.pop(shape, None)
        self.bytes.pop(shape, None)

    def train(self, shape: Shape, stream: Stream) -> dict[str, Reconstruct]:
        stepper = self.make(shape)
        for number in range(shape.steps):
            stepper.step(number, stream[number])
        return stepper.rules()


class Ours:
    """This toolkit: the whole of `sae.train` is timed, input, normalisation and logging too."""

    def prepare(self, shape: Shape, inputs: list[torch.Tensor]) -> None:
        """Compile the kernels: of a step, and of the line of the log."""
        self.time(shape, inputs, 0.0)

    def time(self, shape: Shape, inputs: list[torch.Tensor], seconds: float) -> list[float]:
        """Seconds per step between lines of the log, each of fifty steps as by default; on a CPU of two."""
        from sae import IterableSource, train
        from sae.config.settings import DictionaryConfig, TrainConfig

        every = TrainConfig().log_every if shape.on_gpu else 2
        lines: list[float] = []

        def progress(*_: object) -> None:
            lines.append(time.perf_counter())
            if len(lines) > 1 and lines[-1] - lines[0] >= seconds:
                raise EnoughTimed

        settings = TrainConfig(tokens=shape.steps * shape.batch, batch_size=shape.batch, log_every=every)
        with contextlib.suppress(EnoughTimed):
            train(
                IterableSource(inputs), DictionaryConfig(**config(shape)), settings, device=shape.device,
                progress=progress,
            )  # fmt: skip
        return [(after - before) / every for before, after in itertools.pairwise(lines)]

    def others(self, shape: Shape) -> int:
        """Nothing is kept between turns."""
        return 0

    def drop(self, shape: Shape) -> None:
        """Nothing to drop."""

    def train(self, shape: Shape, stream: Stream) -> dict[str, Reconstruct]:
        from sae import IterableSource, train
        from sae.config.settings import DictionaryConfig, TrainConfig

        settings = TrainConfig(tokens=shape.steps * shape.batch, batch_size=shape.batch)
        made = train(IterableSource(stream), DictionaryConfig(**config(shape)), settings, device=shape.device)
        made = made.to(shape.device)
        return {"": lambda x: (made(x), made.encode(x))}


def config(shape: Shape) -> dict[str, Any]:
    return {"architecture": shape.architecture, "d_sae": shape.d_sae, "k": shape.k}


def synchronise(shape: Shape) -> None:
    if shape.on_gpu:
        torch.cuda.synchronize()


@torch.no_grad()
def score(reconstruct: Reconstruct, held_out: list[torch.Tensor]) -> dict[str, float]:
    """FVU, L0 and features that never fire, on held-out batches."""
    mean = torch.cat(held_out).mean(0)
    error = total = active = 0.0
    fired = torch.zeros(0)
    rows = 0
    for x in itertools.chain.from_iterable(batch.split(2048) for batch in held_out):
        x_hat, features = reconstruct(x)
        error += float((x - x_hat).double().square().sum())
        total += float((x - mean).double().square().sum())
        active += float((features > 0).sum())
        now = (features > 0).any(0)
        fired, rows = now | fired if len(fired) else now, rows + len(x)
    return {"fvu": error / total, "l0": active / rows, "never_fired": int((~fired).sum())}


def answer(toolkit: Peer | Ours, request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked."""
    shape = Shape(**request["shape"])
    stream = Stream(shape.batch, shape.d_in, shape.device)
    started = time.perf_counter()
    found: dict[str, Any] = {}
    if request["do"] in ("prepare", "time"):
        inputs = [stream[number] for number in range(INPUTS)]
        if shape.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        if request["do"] == "prepare":
            toolkit.prepare(shape, inputs)
        else:
            found["seconds"] = toolkit.time(shape, inputs, request["seconds"])
        found["peak_bytes"] = peak_bytes(shape, inputs) - toolkit.others(shape)
    elif request["do"] == "score":
        rules = toolkit.train(shape, stream)
        held_out = [stream[HELD_OUT + number] for number in range(2)]
        scores = {name: score(rule, held_out) for name, rule in rules.items()}
        found |= {**scores.pop(""), "other_rules": scores}
    else:
        toolkit.drop(shape)
    found["took"] = time.perf_counter() - started
    return found


def allocated(shape: Shape) -> int:
    return torch.cuda.memory_allocated() if shape.on_gpu else 0


def peak_bytes(shape: Shape, inputs: list[torch.Tensor]) -> int:
    """The most GPU memory in use, without the batches that the benchmark holds; on a CPU that of the process."""
    if not shape.on_gpu:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated() - sum(x.numel() * x.element_size() for x in inputs)


def version(family: str) -> str:
    if family != "sae":
        return importlib.metadata.version(PACKAGES[family])
    import sae

    return sae.__version__


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name = sys.argv[1]
    family = name.partition(",")[0]
    stand_in_for(family)
    torch.manual_seed(0)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    toolkit = Ours() if family == "sae" else Peer(PEERS[name])
    print(json.dumps({"version": version(family)}), file=answers)
    for line in sys.stdin:
        try:
            found = answer(toolkit, json.loads(line))
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            found = {"error": f"{type(error).__name__}: {text[0]}"[:300]}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
