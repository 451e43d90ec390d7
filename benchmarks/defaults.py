"""What each default of training is worth: one setting at a time is changed, everything else stays as it is.

    python benchmarks/defaults.py CACHE [HOOK]

CACHE is an activation cache that `sae harvest` made; that of `configs/quickstart.yaml` will do. Dictionaries of one
architecture, batch size and length are trained in one pass. Each is scored on held-out activations: FVU against that of
the default on its line, and features that never fire. Where L0 comes out a little beside k, FVU is taken at k: times
√(L0 / k). Results go to `docs/results/`, the figure to `docs/`; each pass's are kept in `--keep`, and the same
command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import report
import torch
from peers.quality_worker import score
from quality import KEPT, activations, digest, sources

from sae.activations import ActivationCache
from sae.activations.loader import ActivationLoader
from sae.architectures import ARCHITECTURES
from sae.config.settings import DictionaryConfig, TrainConfig
from sae.config.splits import HELD_OUT
from sae.dictionary.base import Dictionary
from sae.evaluation.pareto import ARCHITECTURE_COLOURS
from sae.files.writing import write_json
from sae.results.figure import Canvas, logarithmic
from sae.training import Recipe, train_all
from sae.training.firing import default_dead_after
from sae.training.schedules import default_learning_rate

DOCS = Path(__file__).parents[1] / "docs"
MANY = 0.05
"""Share of features that never fire from which on a point is drawn hollow."""
FAR = 0.15
"""Share of k by which L0 may be off; further off FVU says nothing beside the default's."""
BATCH = 2048


@dataclass(frozen=True)
class Trial:
    """A dictionary to train: what differs from the defaults.

    Attributes:
        architecture: its architecture.
        d_sae: its width; 0: the usual one.
        length: training tokens, as a multiple of the usual number.
        settings: of `TrainConfig`, in a form that can be compared; `lr` counts in default rates.
    """

    architecture: str = "topk"
    d_sae: int = 0
    length: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Panel:
    """One setting: its values, and a line of trials for whatever it was tried on.

    Attributes:
        name: the setting.
        values: what is tried, as shown.
        default: which of these is the default.
        lines: by label, a trial for each value or None where it was not tried.
    """

    name: str
    values: list[str]
    default: int
    lines: Mapping[str, Sequence[Trial | None]]


@dataclass(frozen=True)
class Scores:
    """FVU at k, L0, and the share of features that never fired, on held-out activations; means over seeds."""

    fvu: float
    l0: float
    never_fired: float


def panel(name: str, values: Mapping[str, Any], default: str, architectures: tuple[str, ...] = ("topk",)) -> Panel:
    """A setting on several architectures; the default's trial is the one without any change."""
    lines = {
        architecture: [
            Trial(architecture, settings=() if shown == default else ((name, value),))
            for shown, value in values.items()
        ]
        for architecture in architectures
    }
    return Panel(name, list(values), list(values).index(default), lines)


def rate_panel(name: str, of: Mapping[str, dict[str, Any]], wide: str) -> Panel:
    """The learning rate in default rates, on dictionaries that differ in something else; further out on one of them."""
    factors = {"¼": 0.25, "½": 0.5, "1": 1.0, "2": 2.0, "4": 4.0}
    lines = {
        label: [
            Trial(**changes, settings=() if factor == 1 else (("lr", factor),))
            if label == wide or 0.25 < factor < 4
            else None
            for factor in factors.values()
        ]
        for label, changes in of.items()
    }
    return Panel(name, list(factors), list(factors).index("1"), lines)


def panels(d_sae: int, d_in: int, k: int, tokens: int) -> list[Panel]:
    """Everything that is tried."""
    usual = f"{default_dead_after(d_sae, k, tokens):,}"
    widths = {f"{d_sae // 2:,}": {"d_sae": d_sae // 2}, f"{d_sae:,}": {}, f"{4 * d_sae:,}": {"d_sae": 4 * d_sae}}
    lengths = {"½": {"length": 0.5}, "1": {}, "3": {"length": 3.0}}
    warmups = {"0": 0.0, "0.05": 0.05, "0.1": 0.1, "0.25": 0.25, "0.5": 0.5}
    everyone = {name: {"architecture": name} for name in ARCHITECTURES}
    return [
        rate_panel("lr, in default rates, by d_sae", widths, f"{d_sae:,}"),
        rate_panel("lr, in default rates, by length", lengths, "1"),
        rate_panel("lr, in default rates", everyone, ""),
        panel("batch_size", {str(n): n for n in (512, 1024, BATCH, 4096)}, str(BATCH)),
        panel("warmup_fraction", {"0": 0.0, "0.02": 0.02, "0.1": 0.1, "0.3": 0.3}, "0.02"),
        panel("decay_fraction", {"0": 0.0, "0.1": 0.1, "0.2": 0.2, "0.5": 0.5, "0.8": 0.8}, "0.2"),
        panel("beta1", {"0": 0.0, "0.5": 0.5, "0.9": 0.9, "0.95": 0.95}, "0.9"),
        panel("beta2", {"0.9": 0.9, "0.99": 0.99, "0.999": 0.999, "0.9999": 0.9999}, "0.999"),
        panel("aux_coefficient", {"0": 0.0, "1/32": 1 / 32, "1": 1.0}, "1", tuple(ARCHITECTURES)),
        panel("k_aux", {"k / 4": k // 4, "k": k, "d_in / 2": d_in // 2, "d_in": d_in}, "k", ("topk", "jumprelu")),
        panel("dead_after_tokens", {usual: 0, "200,000": 200_000, "never": 10**12}, usual, tuple(ARCHITECTURES)),
        panel("initial_b_dec", {"median": "geometric_median", "mean": "mean", "zeros": "zeros"}, "median"),
        panel("center", {"no": False, "yes": True}, "no", ("topk", "jumprelu")),
        panel("bandwidth", {"¼": 0.25, "½": 0.5, "1": 1.0, "2": 2.0, "4": 4.0}, "1", ("jumprelu",)),
        panel("sparsity_warmup_fraction", warmups, "0.05", ("gated", "jumprelu")),
        panel("sparsity_warmup_fraction", warmups, "0.1", ("relu",)),
    ]


def train_trials(trials: list[Trial], cache: ActivationCache, hook: str, a: argparse.Namespace) -> dict[Trial, Scores]:
    """Score every trial, those of one architecture, batch and length trained in one pass; without what diverged."""
    passes: dict[tuple[str, int, float], list[Trial]] = defaultdict(list)
    for trial in dict.fromkeys(trials):
        passes[trial.architecture, dict(trial.settings).get("batch_size", BATCH), trial.length].append(trial)
    held_out = activations(cache, hook, HELD_OUT).to(a.device)
    found: dict[Trial, list[Scores]] = defaultdict(list)
    for ((_, batch, length), members), seed in itertools.product(passes.items(), range(a.seeds)):
        recipes = {str(n): recipe(trial, batch, round(a.tokens * length), seed, a) for n, trial in enumerate(members)}
        loader = ActivationLoader(cache, hook, batch_size=batch, seed=seed, device=a.device)
        scores = train_pass(recipes, loader, held_out, cache.manifest.identity(hook), a)
        for name, made in scores.items():
            found[members[int(name)]].append(made)
    return {
        trial: Scores(*(statistics.mean(values) for values in zip(*map(astuple, of_seeds), strict=True)))
        for trial, of_seeds in found.items() if len(of_seeds) == a.seeds
    }  # fmt: skip


def train_pass(
    recipes: dict[str, Recipe], loader: ActivationLoader, held_out: torch.Tensor, identity: str, a: argparse.Namespace
) -> dict[str, Scores]:
    """Train and score dictionaries of one architecture, unless that was done before."""
    first = next(iter(recipes.values()))
    depends_on = [*sources("sae", Path(sys.executable)), Path(__file__), identity, a.device, repr(recipes)]
    label = f"defaults-{first.dictionary.architecture}-{first.seed}"
    kept = a.keep / f"{label}-{digest(depends_on)}.json"
    if kept.exists():
        return {name: Scores(**made) for name, made in json.loads(kept.read_text()).items()}
    started = time.perf_counter()
    outcome = train_all({"activations": loader}, recipes, device=a.device)
    scores = {
        name: measured(made.to(a.device), held_out, first.dictionary.architecture, a.k)
        for name, made in outcome.dictionaries.items()
    }
    write_json(kept, {name: asdict(made) for name, made in scores.items()})
    print(f"{label}: {len(recipes)} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return scores


def recipe(trial: Trial, batch: int, tokens: int, seed: int, a: argparse.Namespace) -> Recipe:
    d_sae = trial.d_sae or a.d_sae
    settings = {"tokens": tokens, "batch_size": batch, **dict(trial.settings)}
    if "lr" in settings:
        settings["lr"] *= default_learning_rate(d_sae, tokens // batch)
    shape = {"architecture": trial.architecture, "d_sae": d_sae, "k": a.k}
    return Recipe(DictionaryConfig.model_validate(shape), TrainConfig.model_validate(settings), seed)


@torch.no_grad()
def measured(dictionary: Dictionary, held_out: torch.Tensor, architecture: str, k: int) -> Scores:
    found = score(lambda x: (dictionary(x), dictionary.encode(x)), held_out)
    at_k = 1.0 if architecture == "topk" else (found["l0"] / k) ** 0.5
    return Scores(found["fvu"] * at_k, found["l0"], found["never_fired"] / dictionary.d_sae)


def ratio_of(trial: Trial | None, base: Trial | None, found: Mapping[Trial, Scores], k: int) -> float | None:
    """FVU over that of the default; None where one of them diverged or is far from k."""
    one, other = (None if t is None else found.get(t) for t in (trial, base))
    if one is None or other is None or max(abs(one.l0 / k - 1), abs(other.l0 / k - 1)) > FAR:
        return None
    return one.fvu / other.fvu


def draw(shown: list[Panel], found: Mapping[Trial, Scores], k: int) -> bytes:
    """A panel for each setting: FVU over that of the default, hollow where many features never fire."""
    columns = 4
    rows = -(-len(shown) // columns)
    canvas = Canvas(rows, columns, (3.1 * columns, 2.3 * rows))
    palette = ["#2b6ca3", "#d97b29", "#3b8a4f", "#9d3c8a", "#b45309", "#6b7280"]
    for axes, one in zip(canvas.axes, shown, strict=False):
        heights = []
        for number, (label, trials) in enumerate(one.lines.items()):
            points = [
                (place, ratio, found[trial].never_fired)
                for place, trial in enumerate(trials)
                if trial is not None and (ratio := ratio_of(trial, trials[one.default], found, k)) is not None
            ]
            colour = ARCHITECTURE_COLOURS.get(label, palette[number % len(palette)])
            axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, linewidth=1.2, label=label)
            for place, height, share in points:
                fill = "white" if share > MANY else colour
                axes.plot(place, height, "o", color=colour, markerfacecolor=fill, markersize=4.5)
            heights += [height for _, height, _ in points]
        axes.axvline(one.default, color="#d1d5db", linewidth=5, zorder=0)
        axes.set_xticks(range(len(one.values)), one.values)
        title = one.name if len(one.lines) > 1 else f"{one.name}, {next(iter(one.lines))}"
        axes.set_title(title, fontsize=9, loc="left", color="#374151")
        if not heights:
            continue
        if max(heights) > 1.5:
            logarithmic(axes, "y", (min(heights), max(heights)))
        else:
            axes.set_ylim(min(0.95, min(heights) - 0.02), max(1.05, max(heights) + 0.02))
        if len(one.lines) > 1:
            axes.legend(frameon=False, fontsize=6.5, labelcolor="#374151", ncols=2)
    for axes in canvas.axes[len(shown) :]:
        axes.set_visible(False)
    return canvas.png()


def table(shown: list[Panel], found: Mapping[Trial, Scores], k: int) -> str:
    """Every point of the figure."""
    rows = []
    for one in shown:
        for label, trials in one.lines.items():
            for value, trial in zip(one.values, trials, strict=True):
                if trial is None:
                    continue
                made, ratio = found.get(trial), ratio_of(trial, trials[one.default], found, k)
                cells = ["diverged", "–", "–", "–"]
                if made is not None:
                    relative = "–" if ratio is None else f"{ratio:.3f}"
                    cells = [f"{made.fvu:.4f}", relative, f"{made.l0:.1f}", f"{made.never_fired:.1%}"]
                mark = " (default)" if trial == trials[one.default] else ""
                rows.append([one.name, label, f"{value}{mark}", *cells])
    return report.table(["setting", "of", "value", "FVU at k", "÷ default's", "L0", "never fired"], rows, left=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("hook", nargs="?", help="default: the cache's first")
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=800_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--keep", type=Path, default=KEPT, help="results of single passes")
    parser.add_argument("--name", default="defaults", help="of the files in docs/results/ and of the figure in docs/")
    a = parser.parse_args()
    cache = ActivationCache(a.cache)
    hook = a.hook or next(iter(cache.manifest.hooks))
    shown = panels(a.d_sae, cache.d_in(hook), a.k, a.tokens)
    wanted = [trial for one in shown for line in one.lines.values() for trial in line if trial is not None]
    found = train_trials(wanted, cache, hook, a)
    model = cache.manifest.model.get("name")
    text = (
        f"{model}, `{hook}`, {cache.d_in(hook)} → {a.d_sae:,}, k {a.k}, batch {BATCH:,}, {a.tokens:,} tokens, "
        f"{a.seeds} seeds, unless said.\n\n{table(shown, found, a.k)}"
    )
    arguments = {name: value for name, value in vars(a).items() if not isinstance(value, Path)}
    numbers = {"arguments": arguments, "trials": [{**asdict(trial), **asdict(made)} for trial, made in found.items()]}
    report.write(a.name, "What each default of training is worth", text, numbers, report.machine(a.device))
    (DOCS / f"{a.name}.png").write_bytes(draw(shown, found, a.k))


if __name__ == "__main__":
    main()
