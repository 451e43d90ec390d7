"""Sweeps: many dictionaries from one configuration, trained in one pass, evaluated together and compared."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sae.activations.cache import ActivationCache
from sae.config.check import amount_notes, check_amounts
from sae.config.file import TRUST_SETTING
from sae.config.progress import Notes, Progress, announce, silent
from sae.config.settings import RunConfig
from sae.config.splits import TRAIN
from sae.dictionary.base import Dictionary
from sae.errors import FormatError, named
from sae.evaluation.pareto import Point, draw_pareto
from sae.evaluation.report import DOCUMENTS_FILE
from sae.evaluation.report import JSON_FILE as REPORT_FILE
from sae.evaluation.sweep_view import Differences, behind_best, sweep_markdown
from sae.files.kept import KeptResult
from sae.files.reading import load_tensors, read_object, taken_apart
from sae.files.writing import locked
from sae.results.markdown import code, plain
from sae.runs.evaluation import evaluate_runs
from sae.runs.folder import DICTIONARY, configured
from sae.runs.run import Run
from sae.runs.sources import Sources
from sae.runs.variants import variant_label, variants
from sae.training.check import common_pass
from sae.training.checkpoint import CHECKPOINTS, list_checkpoints
from sae.training.loop import train_all
from sae.training.recipe import Recipe
from sae.training.sinks import Wandb

MARKDOWN_FILE, FIGURE_FILE = "sweep.md", "pareto.png"
SWEEP = KeptResult(None, "sweep.json")
COST = KeptResult(None, "cost.json")


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        folder: folder of `sweep.json`, `sweep.md`, `pareto.png` and a run folder for each dictionary.
        points: one for each trained dictionary, by the name of its folder.
        failures: why the other dictionaries stopped.
        behind: gap of each to the best of its k, by name and metric.
        of: description of the activations that all were trained and evaluated on.
    """

    folder: Path
    points: dict[str, Point]
    failures: dict[str, str]
    behind: Differences
    of: str

    def dictionary(self, name: str) -> Dictionary:
        """Load a trained dictionary by the name of its folder."""
        return Run.open(self.folder / name, (f"{TRUST_SETTING}=false",)).dictionary()


def sweep(config: RunConfig, progress: Progress = silent) -> Sweep:
    """Harvest missing activations, train every missing variant, evaluate, and compare.

    A variant is a combination of the values under `config.sweep` (see `sae.runs.variants`). Variants are trained in one
    pass over the activations and evaluated in another, at most `config.sweep_at_once` at a time.

    Args:
        config: the configuration, with lists of values under `sweep`.
        progress: called with (stage, tokens done, tokens in total).

    Raises:
        ConfigError: nothing is swept, or something that cannot be, or there are more than 1,000 combinations.
        TrainingInterrupted: Ctrl-C; every state was saved, and the same sweep resumes.
        SaeError: a step of a run fails.
    """
    base = Run(config, progress)
    base.say_hook()
    config = base.config
    configs = variants(config)
    check_amounts(config)
    announce(progress, *amount_notes(config))
    runs = {name: Run(variant, progress) for name, variant in configs.items()}
    _share_starts(runs.values())
    for name, run in runs.items():
        with named(name):
            run.check()
    with locked(base.folder, "sweep"):
        cache = base.harvest()
        failures = _train(base, runs, cache, progress)
        trained = {name: run for name, run in runs.items() if name not in failures}
        unevaluated = [run for run in trained.values() if not run.is_evaluated()]
        for run in unevaluated:
            run.language_model = base.language_model
        if unevaluated:
            evaluate_runs(unevaluated, config.sweep_at_once)
        points = {name: _point(run, variant_label(config, run.config)) for name, run in trained.items()}
        behind = behind_best(points, {name: load_tensors(run.folder / DOCUMENTS_FILE) for name, run in trained.items()})
        result = Sweep(base.folder, points, failures, behind, _description(base, cache, configs.values()))
        _write(result)
    return result


def _train(base: Run, runs: Mapping[str, Run], cache: ActivationCache, progress: Progress) -> dict[str, str]:
    """Train missing dictionaries; those with a checkpoint of a common step resume together, new ones start together."""
    missing = {name: run for name, run in runs.items() if not _is_trained_already(run, cache)}
    if not missing:
        return {}
    recipes = {name: run.recipe(cache) for name, run in missing.items()}
    sources = _sources(base, missing, cache)
    common_pass(sources, recipes, base.device)  # finds variants that cannot be trained before any training
    failures: dict[str, str] = {}
    for group in _groups_by_step(missing):
        at_once = base.config.sweep_at_once or len(group)
        for start in range(0, len(group), at_once):
            part = dict(itertools.islice(group.items(), start, start + at_once))
            with contextlib.ExitStack() as stack:
                for run in part.values():
                    stack.enter_context(locked(run.folder, "training"))
                left = {name: run for name, run in part.items() if not _is_trained_already(run, cache)}
                if left:
                    failures |= _train_together(base, left, _sources(base, left, cache), recipes, progress)
    return failures


def _is_trained_already(run: Run, cache: ActivationCache) -> bool:
    """Whether the dictionary exists with the requested settings.

    Raises:
        FormatError: it was made with other settings.
    """
    if run.is_trained():
        run.trained_already(cache)
        return True
    return False


def _groups_by_step(runs: dict[str, Run]) -> Iterator[dict[str, Run]]:
    """Groups of runs with a checkpoint of a common step, largest first; runs without checkpoints come last."""
    steps = {name: {path.name for path in list_checkpoints(run.folder / CHECKPOINTS)} for name, run in runs.items()}
    while any(steps.values()):
        counts = Counter(itertools.chain.from_iterable(steps.values()))
        best = max(counts, key=lambda step: (counts[step], step))
        group = [name for name, names in steps.items() if best in names]
        yield {name: runs[name] for name in group}
        steps = {name: names for name, names in steps.items() if name not in group}
    if steps:
        yield {name: runs[name] for name in steps}


def _share_starts(runs: Iterable[Run]) -> None:
    """Load each dictionary that several runs start from once; a missing one raises an error when it is needed."""
    first: dict[str, Run] = {}
    for run in runs:
        place = run.config.train.start_from
        if place is not None and first.setdefault(place, run) is not run:
            with contextlib.suppress(FormatError):
                run.start = first[place].start


def _sources(base: Run, runs: Mapping[str, Run], cache: ActivationCache) -> Sources:
    """Sources of the activations that the runs are trained on, by hook point."""
    hooks = dict.fromkeys(hook for run in runs.values() for hook in run.config.hooks)
    return base.sources(cache, list(hooks), _stage(runs))


def _stage(runs: Mapping[str, Run]) -> str:
    return f"train {len(runs)}"


def _train_together(
    base: Run,
    runs: Mapping[str, Run],
    sources: Sources,
    recipes: Mapping[str, Recipe],
    progress: Progress,
) -> dict[str, str]:
    sinks: dict[str, list[Wandb]] = {}
    finished: set[str] = set()
    first = next(iter(runs.values()))
    stage = _stage(runs)
    progress(stage, *first.trained_tokens(sources[first.config.hook]))

    def show(done: int, total: int, metrics: Mapping[str, Mapping[str, float | int]]) -> None:
        progress(stage, done, total)
        fvus = [values["fvu"] for values in metrics.values()]
        if isinstance(progress, Notes) and fvus:
            progress.beside(stage, f"FVU {min(fvus):.3f} to {max(fvus):.3f}")

    try:
        sinks |= {name: run.sinks() for name, run in runs.items()}
        with contextlib.ExitStack() as stack:
            for run in runs.values():
                stack.enter_context(configured(run.config))
            outcome = train_all(
                sources,
                {name: recipes[name] for name in runs},
                device=base.device,
                sinks=sinks,
                progress=show,
            )
        for name, dictionary in outcome.dictionaries.items():
            COST.write(runs[name].folder, {**vars(outcome.costs[name]), "device": base.device.type})
            dictionary.save(runs[name].folder / DICTIONARY)
            finished.add(name)
    finally:
        for name, run_sinks in sinks.items():
            for sink in run_sinks:
                sink.close(failed=name not in finished)
    return outcome.failures


def _point(run: Run, variant: str) -> Point:
    """A dictionary's point in the comparison, from its files."""
    settings = run.config.train
    with taken_apart(run.folder / REPORT_FILE):
        return Point.of(
            run.config.dictionary.architecture,
            read_object(run.folder / REPORT_FILE),
            hook=" → ".join(run.config.hooks),
            d_sae=run.config.dictionary.d_sae,
            k=run.config.dictionary.k,
            seed=run.config.seed,
            weight=settings.l0_coefficient if settings.l1_coefficient is None else settings.l1_coefficient,
            cost=COST.find(run.folder) or {},
            variant=variant,
        )


def _description(base: Run, cache: ActivationCache, configs: Collection[RunConfig]) -> str:
    """The activations that all dictionaries of a sweep were trained on: hook points, widths and amounts."""
    hooks = dict.fromkeys(" → ".join(map(code, variant.hooks)) for variant in configs)
    widths = dict.fromkeys(
        " → ".join([f"{cache.d_in(variant.hook):,}", f"{variant.dictionary.d_sae:,}",
                    *([f"{cache.d_in(variant.gives):,}"] if variant.gives != variant.hook else [])])
        for variant in configs
    )  # fmt: skip
    settings = base.config.train
    tokens = "one epoch" if settings.tokens is None else f"{settings.tokens:,} tokens"
    return (
        f"{plain(cache.manifest.model.get('name'))}, {', '.join(hooks)}, {', '.join(widths)}; {tokens} in batches of "
        f"{settings.batch_size:,}, of a cache of {cache.manifest.rows[TRAIN]:,}; evaluated on held-out documents."
    )


def _write(result: Sweep) -> None:
    content = {
        "points": {name: point.to_json() for name, point in result.points.items()},
        "behind": {
            name: {metric: gap.to_json() for metric, gap in gaps.items()} for name, gaps in result.behind.items()
        },
        "failures": result.failures,
        "of": result.of,
    }
    figure = draw_pareto(list(result.points.values()))
    figures = {FIGURE_FILE: figure} if figure else {}
    text = sweep_markdown(result.points, result.failures, next(iter(figures), None), result.behind, result.of)
    SWEEP.write(result.folder, content, {**figures, MARKDOWN_FILE: text.encode()})
