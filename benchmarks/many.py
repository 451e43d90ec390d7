"""Many dictionaries trained in one pass over a cache, beside the same ones trained one by one.

    python benchmarks/many.py

The cache holds random activations in GPT-2 small's width. Every pass reads from disk by way of the loader. Target: one
pass costs less than 1.1 times the sum of the single trainings.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import report
from harvest import HOOK, write_synthetic_cache

from sae.activations import ActivationCache
from sae.activations.loader import ActivationLoader
from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.training import Outcome, Recipe, train_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=6144)
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="many-cpu", help="of the files in docs/results/")
    a = parser.parse_args()
    settings = TrainConfig(tokens=a.steps * a.batch, batch_size=a.batch)
    recipes = {
        f"{architecture}, k {k}": Recipe(
            DictionaryConfig(architecture=architecture, d_sae=a.d_sae, k=k),  # type: ignore[arg-type]
            settings,
            source=HOOK,
        )
        for architecture in ARCHITECTURES
        for k in a.ks
    }
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache(write_synthetic_cache(Path(folder), a.steps * a.batch))

        def timed(chosen: dict[str, Recipe]) -> tuple[float, Outcome]:
            start = time.perf_counter()
            loader = ActivationLoader(cache, HOOK, batch_size=a.batch, device=a.device)
            outcome = train_all({HOOK: loader}, chosen, device=a.device)
            return time.perf_counter() - start, outcome

        warm = recipes if a.device != "cpu" else dict(itertools.islice(recipes.items(), 1))
        timed(warm)  # on a GPU every architecture's kernels are compiled
        alone = {name: timed({name: recipe})[0] for name, recipe in recipes.items()}
        together, outcome = timed(recipes)
    total = sum(alone.values())
    cells = [
        [name, f"{alone[name]:.2f}", f"{cost.seconds:.2f}", f"{1e6 * cost.seconds / cost.tokens:.1f}",
         f"{cost.bytes / 1e6:.0f}"]
        for name, cost in outcome.costs.items()
    ]  # fmt: skip
    cells.append(
        ["all", f"{total:.2f}", f"{together:.2f}", "", f"{sum(c.bytes for c in outcome.costs.values()) / 1e6:.0f}"]
    )
    head = [
        "dictionary",
        "alone, s",
        "its steps in the common pass, s",
        "ms a thousand tokens",
        "weights and optimiser, MB",
    ]
    shape = f"{cache.d_in(HOOK)} → {a.d_sae:,}, batch {a.batch:,}, {a.steps} steps, read from a cache on disk."
    ratio = f"One pass for all took {together / total:.3f} times the sum of the single trainings (target: below 1.1)."
    text = f"{shape}\n\n{report.table(head, cells)}\n{ratio}\n"
    numbers = {"alone": alone, "together": together, "ratio": together / total}
    report.write(a.name, "Many dictionaries in one pass", text, numbers, report.machine(a.device))


if __name__ == "__main__":
    main()
