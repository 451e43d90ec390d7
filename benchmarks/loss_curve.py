"""Is the sparse step the dense one? The error of `sae.train` beside that of dense autograd, step by step, in float32.

    python benchmarks/loss_curve.py

The dense step is the tests' reference: plain autograd, torch's Adam, projection, renormalisation. Both see the same
batches, a new one each step, and begin with the same weights; none of the steps has dead features, and the learning
rate rises to its default over all of them, as at the start of a long training. Each seed has data and initial weights
of its own. Target: a relative difference of at most 2e-4 after a hundred steps, in no direction. (Adam turns rounding
into a part of a step wherever a gradient is nearly nothing, and what is among the k largest jumps, so any two orders of
summation part in the end, and the sooner the higher the rate.)
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import report
import torch

import sae
from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.numerics.seeding import torch_generator
from sae.training.initialise import initialise_
from sae.training.schedules import default_learning_rate, learning_rate

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "peers")]
from data import activations  # noqa: E402  # pyright: ignore[reportMissingImports]

from tests.support.dense_reference import DenseReference  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--architectures", nargs="+", default=["topk", "batch_topk"])
    parser.add_argument("--name", default="loss-curve-cpu", help="of the files in docs/results/")
    arguments = parser.parse_args()
    curves = [
        compare(name, seed, activations(arguments.steps, arguments.batch, arguments.d_in, seed), arguments)
        for name in arguments.architectures
        for seed in range(arguments.seeds)
    ]
    tenth = max(1, arguments.steps // 10)
    cells = []
    for curve in curves:
        differences = [a / b - 1 for a, b in zip(curve["sparse"], curve["dense"], strict=True)]
        cells.append(
            [
                f"{curve['architecture']}, {curve['seed']}",
                f"{curve['sparse'][0]:.3f} → {curve['sparse'][-1]:.3f}",
                f"{max(map(abs, differences)):.1e}",
                f"{differences[-1]:+.1e}",
                *(f"{statistics.mean(part):+.1e}" for part in (differences[:tenth], differences[-tenth:])),
                f"{curve['dense_seconds'] / curve['sparse_seconds']:.1f}",
            ]
        )
    head = [
        "architecture, seed", "‖x − x̂‖², first and last step", "largest relative difference", "at the last step",
        f"mean of the first {tenth} steps", f"mean of the last {tenth}", "dense ÷ sparse seconds",
    ]  # fmt: skip
    shape = f"d_in {arguments.d_in}, d_sae {arguments.d_sae:,}, batch {arguments.batch:,}, k {arguments.k}"
    text = f"{shape}, {arguments.steps} steps. Differences are sparse ÷ dense − 1.\n\n{report.table(head, cells)}"
    numbers = {"curves": curves}
    report.write(arguments.name, "Loss curve, sparse and dense, CPU, float32", text, numbers, report.machine())


def compare(architecture: str, seed: int, data: list[torch.Tensor], arguments: argparse.Namespace) -> dict[str, Any]:
    """Both curves, and the seconds that each took in all."""
    shape = DictionaryConfig(architecture=architecture, d_sae=arguments.d_sae, k=arguments.k)  # type: ignore[arg-type]
    tokens = arguments.steps * arguments.batch
    settings = TrainConfig(
        tokens=tokens, batch_size=arguments.batch, log_every=1, dead_after_tokens=2 * tokens,
        warmup_fraction=1, decay_fraction=0, encoder_dtype="float32",
    )  # fmt: skip
    source = sae.IterableSource(data)
    sparse: list[float] = []
    start = time.perf_counter()
    sae.train(
        source, shape, settings, seed=seed, progress=lambda done, of, metrics: sparse.append(float(metrics["mse"]))
    )
    sparse_seconds = time.perf_counter() - start

    scale = (source.d_in / source.statistics.variance) ** 0.5
    cls = ARCHITECTURES[architecture]
    dictionary = cls(source.d_in, shape.d_sae, **{name: getattr(shape, name) for name in cls.setting_names})
    initialise_(dictionary, data[0] * scale, torch_generator("initial weights: training", seed))
    reference = DenseReference(architecture, dictionary, settings)
    peak, dense = default_learning_rate(shape.d_sae, arguments.steps), []
    start = time.perf_counter()
    for step, x in enumerate(itertools.islice(itertools.cycle(data), arguments.steps)):
        rate = learning_rate(step, arguments.steps, peak, settings.warmup_fraction, settings.decay_fraction)
        dense.append(reference.step(x * scale, rate))
        print(f"{architecture}, seed {seed}, step {step + 1}: {sparse[step]:.6f}, {dense[-1]:.6f}", file=sys.stderr)
    seconds = {"sparse_seconds": sparse_seconds, "dense_seconds": time.perf_counter() - start}
    return {"architecture": architecture, "seed": seed, "sparse": sparse, "dense": dense, **seconds}


if __name__ == "__main__":
    main()
