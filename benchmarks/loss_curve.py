"""Is the sparse step the dense one? The error of `sae.train` beside that of dense autograd, step by step, in float32.

    python benchmarks/loss_curve.py

The dense step is the tests' reference: plain autograd, torch's Adam, projection, renormalisation. Both see the same
batches, a new one each step, and begin with the same weights; none of the steps has dead features, and the learning
rate rises to its default over all of them, as at the start of a long training. Target: a relative difference of at most
1e-4 over a hundred steps. (Adam turns rounding into a part of a step wherever a gradient is nearly nothing, and what is
among the k largest jumps, so any two orders of summation part in the end, and the sooner the higher the rate.)
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

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
    parser.add_argument("--architectures", nargs="+", default=["topk", "batch_topk"])
    parser.add_argument("--name", default="loss-curve-cpu", help="of the files in docs/results/")
    arguments = parser.parse_args()
    data = activations(arguments.steps, arguments.batch, arguments.d_in)
    curves = {name: compare(name, data, arguments) for name in arguments.architectures}
    cells = [
        [
            name,
            f"{curve['sparse'][0]:.3f} → {curve['sparse'][-1]:.3f}",
            f"{max(abs(a / b - 1) for a, b in zip(curve['sparse'], curve['dense'], strict=True)):.1e}",
            f"{curve['dense_seconds'][0] / curve['sparse_seconds'][0]:.1f}",
        ]
        for name, curve in curves.items()
    ]
    head = ["architecture", "‖x − x̂‖², first and last step", "largest relative difference", "dense ÷ sparse seconds"]
    shape = f"d_in {arguments.d_in}, d_sae {arguments.d_sae:,}, batch {arguments.batch:,}, k {arguments.k}"
    text = f"{shape}, {arguments.steps} steps.\n\n{report.table(head, cells)}"
    report.write(arguments.name, "Loss curve, sparse and dense, CPU, float32", text, curves, report.machine())


def compare(architecture: str, data: list[torch.Tensor], arguments: argparse.Namespace) -> dict[str, list[float]]:
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
    sae.train(source, shape, settings, progress=lambda done, of, metrics: sparse.append(float(metrics["mse"])))
    sparse_seconds = time.perf_counter() - start

    scale = (source.d_in / source.statistics.variance) ** 0.5
    cls = ARCHITECTURES[architecture]
    dictionary = cls(source.d_in, shape.d_sae, **{name: getattr(shape, name) for name in cls.setting_names})
    initialise_(dictionary, data[0] * scale, torch_generator("initial weights: training", 0))
    reference = DenseReference(architecture, dictionary, settings)
    peak, dense = default_learning_rate(shape.d_sae, arguments.steps), []
    start = time.perf_counter()
    for step, x in enumerate(itertools.islice(itertools.cycle(data), arguments.steps)):
        rate = learning_rate(step, arguments.steps, peak, settings.warmup_fraction, settings.decay_fraction)
        dense.append(reference.step(x * scale, rate))
        print(f"{architecture}, step {step + 1}: {sparse[step]:.6f}, {dense[-1]:.6f}", file=sys.stderr)
    seconds = {"sparse_seconds": [sparse_seconds], "dense_seconds": [time.perf_counter() - start]}
    return {"sparse": sparse, "dense": dense, **seconds}


if __name__ == "__main__":
    main()
