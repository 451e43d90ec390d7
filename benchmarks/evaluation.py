"""What evaluation costs on this machine.

    python benchmarks/evaluation.py

Evaluation of four dictionaries at one hook point, with baselines and language-model losses, beside that of one: of one
size, so that they share baselines, and of four different k. Target: at most 2.5 times. The dictionaries have random
directions, which cost what trained ones cost. There are as many training tokens as baselines are fitted on.

Evaluation of one dictionary (`--only cost`, not part of a plain run: a million tokens take long), whole as it is by
default: reconstruction, losses, sparsity, all baselines with their fitting and training, formulas of other packages.
Beside it the language model's own passes over the same tokens, measured alone with nothing done with their logits: once
up to the hook point, and once on from there for each of the four things that are put there: x itself, x̂, 0, x̄. Target:
at most 1.5 times. In seconds of processor time, all threads together, so that what else the machine does in the
meantime counts little.
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
from harvest import harvest_config, write_random_gpt2

from sae.activations.harvest import harvest
from sae.architectures import TopK
from sae.config.settings import EvaluationConfig
from sae.config.sources import ModelConfig
from sae.config.splits import HELD_OUT
from sae.evaluation import evaluate_all, write_report
from sae.model.language_model import LanguageModel
from sae.training.initialise import initialise_

FROZEN_DECODER = 200_000
SETTINGS = EvaluationConfig(
    downstream_tokens=None, baseline_tokens=16_384, baseline_reconstruction_tokens=None,
    frozen_decoder_tokens=FROZEN_DECODER, legacy_tokens=8192,
)  # fmt: skip
"""Every held-out token for the dictionary, whatever the size of the cache."""


@dataclass(frozen=True)
class Row:
    """Seconds of what is measured and of what it is compared with, each the median of the turns."""

    what: str
    seconds: float
    beside: str
    beside_seconds: float
    target: float | None

    @property
    def ratio(self) -> float:
        return self.seconds / self.beside_seconds


def dictionary(d_in: int, d_sae: int, k: int, seed: int = 0) -> TopK:
    """Random unit directions, read as they are written."""
    made = TopK(d_in, d_sae, k=k)
    generator = torch.Generator().manual_seed(seed)
    initialise_(made, torch.randn(64, d_in, generator=generator), generator)
    return made.eval().requires_grad_(False)


def in_turns(
    first: Callable[[], Any], second: Callable[[], Any], turns: int, *, warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:  # fmt: skip
    """Medians of both, after each has run once to warm up; what takes minutes needs no warming up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + warm_up):
        for kept, function in zip(seconds, (first, second), strict=True):
            start = clock()
            function()
            if turn >= warm_up:
                kept.append(clock() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def evaluations(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Four dictionaries beside one, on the demo model or on random weights in GPT-2 small's shape."""
    if arguments.model == "gpt2-shape":
        name, d_sae, layer = str(write_random_gpt2(folder / "gpt2-shape", None)), arguments.d_sae, 8
    else:
        name, d_sae, layer = "demo", 4096, 2
    language_model = LanguageModel(ModelConfig(name=name))
    fitted_on = max(arguments.held_out, FROZEN_DECODER)
    settings = argparse.Namespace(layer=layer, tokens=fitted_on)
    config = harvest_config(name, settings, folder / "run", held_out=arguments.held_out)
    cache = harvest(config, language_model)
    hook = config.harvest.hooks[0]
    rows = []
    for what, ks in (("of one size", [32] * 4), ("of four sizes", [16, 32, 64, 128])):
        made = {str(number): dictionary(cache.d_in(hook), d_sae, k, number) for number, k in enumerate(ks)}
        one = {"1": made["1"]}

        def run(chosen: dict[str, TopK]) -> None:
            evaluate_all(chosen, cache, hook=hook, language_model=language_model, settings=SETTINGS)

        seconds, alone = in_turns(lambda made=made: run(made), lambda one=one: run(one), arguments.turns)
        shape = f"{arguments.model}, {cache.d_in(hook)} → {d_sae:,}, {arguments.held_out:,} held-out tokens"
        rows.append(Row(f"evaluation of four dictionaries {what}, {shape}", seconds, "of one", alone, 2.5))
    return rows


def cost(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """One dictionary beside the language model's own passes."""
    language_model = LanguageModel(ModelConfig(name="demo"))
    settings = argparse.Namespace(layer=2, tokens=FROZEN_DECODER)
    config = harvest_config("demo", settings, folder / "cost", held_out=arguments.cost_tokens)
    config = config.model_copy(update={"data": config.data.model_copy(update={"holdout_fraction": 0.3})})
    cache = harvest(config, language_model)
    hook = config.harvest.hooks[0]
    made = dictionary(cache.d_in(hook), 4096, arguments.k)

    def evaluation() -> None:
        found = evaluate_all({"one": made}, cache, hook=hook, language_model=language_model, settings=SETTINGS)["one"]
        if arguments.documents:
            write_report(found, arguments.documents)

    def passes() -> None:
        for batch in cache.contexts(HELD_OUT, batch_contexts=SETTINGS.batch_contexts):
            for _ in language_model.replaced_logits(batch.tokens, hook, [lambda x: x] * 4):
                pass

    def whole() -> None:
        for batch in cache.contexts(HELD_OUT, batch_contexts=SETTINGS.batch_contexts):
            language_model.logits(batch.tokens)

    seconds, alone = in_turns(evaluation, passes, arguments.turns, warm_up=False, clock=time.process_time)
    start = time.process_time()
    whole()
    once = time.process_time() - start
    what = f"processor time of evaluating one dictionary, demo, 256 → 4,096, {arguments.cost_tokens:,} held-out tokens"
    return [
        Row(what, seconds, "the model's own passes", alone, 1.5),
        Row(what, seconds, "one whole pass of the model", once, None),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=24576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--model", choices=("demo", "gpt2-shape"), default="demo", help="evaluated on")
    parser.add_argument("--held-out", type=int, default=32_768, help="held-out tokens of the evaluation")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cost-tokens", type=int, default=1_000_000, help="held-out tokens of --only cost")
    parser.add_argument("--documents", type=Path, help="keep its report there, for scripts/interval_coverage.py")
    parser.add_argument("--only", choices=("evaluation", "cost"))
    parser.add_argument("--name", default="evaluation-cpu", help="of the files in docs/results/")
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only in (None, "evaluation"):
            rows += evaluations(Path(folder), arguments)
        if arguments.only == "cost":
            rows += cost(Path(folder), arguments)
    cells = [
        [
            row.what, f"{row.seconds:.2f}", row.beside, f"{row.beside_seconds:.2f}", f"{row.ratio:.3f}",
            "–" if row.target is None else f"≤ {row.target}",
        ]
        for row in rows
    ]  # fmt: skip
    text = report.table(["what", "s", "beside", "s", "ratio", "target"], cells)
    numbers = {"rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}
    report.write(arguments.name, "Evaluation, CPU", text, numbers, report.machine())


if __name__ == "__main__":
    main()
