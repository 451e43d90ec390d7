"""What evaluation and the feature pass cost on this machine.

    python benchmarks/evaluation.py

The feature pass over all features of a dictionary, beside encoding the same tokens and doing nothing with the codes: a
cache of random activations in GPT-2 small's width, every token eligible but the first of each context. Target: at most
1.3 times.

Evaluation of four dictionaries at one hook point, with baselines and language-model losses, beside that of one: of one
size, so that they share baselines, and of four different k. Target: at most 2.5 times. The dictionaries have random
directions, which cost what trained ones cost.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import report
import torch
from harvest import HOOK, harvest_config, write_random_gpt2, write_synthetic_cache

from sae.activations import ActivationCache
from sae.activations.harvest import harvest
from sae.architectures import TopK
from sae.config import EvaluationConfig, FeaturesConfig, ModelConfig
from sae.evaluation import evaluate_all
from sae.features.collect import scan
from sae.language_model import LanguageModel
from sae.tokens import TRAIN
from sae.training.initialise import initialise_


@dataclass(frozen=True)
class Row:
    """Seconds of what is measured and of what it is compared with, each the median of the turns."""

    what: str
    seconds: float
    beside: str
    beside_seconds: float
    target: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.beside_seconds


def dictionary(d_in: int, d_sae: int, k: int, seed: int = 0) -> TopK:
    """Random unit directions, read as they are written."""
    made = TopK(d_in, d_sae, k=k)
    generator = torch.Generator().manual_seed(seed)
    initialise_(made, torch.randn(64, d_in, generator=generator), generator)
    return made.eval().requires_grad_(False)


def in_turns(first: Callable[[], Any], second: Callable[[], Any], turns: int) -> tuple[float, float]:
    """Medians of both, after each has run once to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for kept, function in zip(seconds, (first, second), strict=True):
            start = time.perf_counter()
            function()
            if turn:
                kept.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def feature_pass(folder: Path, arguments: argparse.Namespace) -> Row:
    """`scan` against a loop that encodes."""
    cache = ActivationCache(write_synthetic_cache(folder / "synthetic", arguments.tokens))
    made = dictionary(cache.d_in(HOOK), arguments.d_sae, arguments.k)
    at_once = max(1, (1 << 26) // (arguments.d_sae * cache.context_length))  # as the pass itself does

    @torch.no_grad()
    def encode() -> None:
        for batch in cache.contexts(TRAIN, HOOK, batch_contexts=at_once):
            assert batch.activations is not None
            made.encode_sparse(batch.activations.flatten(0, 1)[batch.eligible.flatten()])

    seconds, alone = in_turns(lambda: scan(made, cache, FeaturesConfig(), HOOK), encode, arguments.turns)
    shape = f"{arguments.tokens:,} tokens, {cache.d_in(HOOK)} → {arguments.d_sae:,}, k {arguments.k}"
    return Row(f"feature pass, {shape}", seconds, "encoding alone", alone, 1.3)


def evaluations(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Four dictionaries beside one, on the demo model or on random weights in GPT-2 small's shape."""
    if arguments.model == "gpt2-shape":
        name, d_sae, layer = str(write_random_gpt2(folder / "gpt2-shape", None)), arguments.d_sae, 8
    else:
        name, d_sae, layer = "demo", 4096, 2
    language_model = LanguageModel(ModelConfig(name=name))
    settings = argparse.Namespace(layer=layer, tokens=arguments.held_out)
    config = harvest_config(name, settings, folder / "run", held_out=arguments.held_out)
    cache = harvest(config, language_model)
    hook = config.harvest.hooks[0]
    rows = []
    for what, ks in (("of one size", [32] * 4), ("of four sizes", [16, 32, 64, 128])):
        made = {str(number): dictionary(cache.d_in(hook), d_sae, k, number) for number, k in enumerate(ks)}
        one = {"1": made["1"]}

        def run(chosen: dict[str, TopK]) -> None:
            evaluate_all(chosen, cache, hook=hook, language_model=language_model, settings=EvaluationConfig())

        seconds, alone = in_turns(lambda made=made: run(made), lambda one=one: run(one), arguments.turns)
        shape = f"{arguments.model}, {cache.d_in(hook)} → {d_sae:,}, {arguments.held_out:,} held-out tokens"
        rows.append(Row(f"evaluation of four dictionaries {what}, {shape}", seconds, "of one", alone, 2.5))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=131_072, help="of the feature pass")
    parser.add_argument("--model", choices=("demo", "gpt2-shape"), default="demo", help="evaluated on")
    parser.add_argument("--held-out", type=int, default=32_768, help="held-out tokens of the evaluation")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=("features", "evaluation"))
    parser.add_argument("--name", default="evaluation-cpu", help="of the files in results/")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "evaluation":
            rows.append(feature_pass(Path(folder), arguments))
        if arguments.only != "features":
            rows += evaluations(Path(folder), arguments)
    cells = [
        [row.what, f"{row.seconds:.2f}", row.beside, f"{row.beside_seconds:.2f}", f"{row.ratio:.3f}", f"≤ {row.target}"]
        for row in rows
    ]
    text = report.table(["what", "s", "beside", "s", "ratio", "target"], cells)
    numbers = {"rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
    report.write(arguments.name, "Evaluation and feature pass, CPU", text, numbers, report.machine())


if __name__ == "__main__":
    main()
