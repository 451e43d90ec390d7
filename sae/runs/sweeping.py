"""Sweeps: many dictionaries from one configuration, trained in one pass, evaluated together and compared."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae.activations.cache import ActivationCache
from sae.config.check import amount_notes, check_amounts
from sae.config.file import TRUST_SETTING, parse_config
from sae.config.progress import Notes, Progress, announce, silent
from sae.config.settings import RunConfig
from sae.config.splits import TRAIN
from sae.dictionary.base import Dictionary
from sae.errors import ConfigError, FormatError, SaeError
from sae.evaluation.pareto import Point, draw_pareto
from sae.evaluation.report import DOCUMENTS_FILE
from sae.evaluation.report import JSON_FILE as REPORT_FILE
from sae.evaluation.sweep_view import Differences, behind_best, sweep_markdown
from sae.files.kept import KeptResult
from sae.files.reading import load_tensors, read_object, taken_apart
from sae.files.writing import locked, stands
from sae.results.markdown import code, plain
from sae.runs.evaluation import evaluate_runs
from sae.runs.folder import DICTIONARY, configured
from sae.runs.run import Run
from sae.runs.sources import Sources
from sae.training.check import common_pass
from sae.training.checkpoint import CHECKPOINTS, list_checkpoints
from sae.training.loop import train_all
from sae.training.recipe import Recipe
from sae.training.sinks import Wandb
from sae.training.traits import no_reader, unread

MARKDOWN_FILE, FIGURE_FILE = "sweep.md", "pareto.png"
SWEEP = KeptResult(None, "sweep.json")
COST = KeptResult(None, "cost.json")
_SHARED = ("tokens", "batch_size", "pool_tokens", "log_every", "checkpoint_every", "shuffle_seed")
_WEIGHTS = ("train.l1_coefficient", "train.l0_coefficient")
MOST_VARIANTS = 1000
"""Maximum number of dictionaries in a sweep, since all train in one pass."""


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


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """Every combination of the values in `config.sweep`, named by the values, as its folder is.

    Raises:
        ConfigError: `config.sweep` is empty, has a key that cannot be swept, a value that is not a list, two
            combinations of the same name, or more than `MOST_VARIANTS` combinations.
    """
    axes = dict(_axes(config.sweep))
    if not axes:
        raise ConfigError(
            "sweep is empty: give lists of values, such as 'sweep.dictionary.k=[16,32]', or use 'sae run' for one "
            "dictionary"
        )
    count = math.prod(map(len, axes.values()))
    if count > MOST_VARIANTS:
        product = " × ".join(f"{len(values)} of {key}" for key, values in axes.items())
        raise ConfigError(
            f"sweep has {count:,} combinations ({product}), but at most {MOST_VARIANTS:,} are possible: give fewer "
            "values, or run several sweeps with one harvest.cache"
        )
    configs: dict[str, RunConfig] = {}
    base_settings = config.model_dump(mode="json", exclude={"sweep", "sweep_at_once"})
    if base_settings["train"]["shuffle_seed"] is None:
        base_settings["train"]["shuffle_seed"] = config.seed  # one order of activations for all
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = _folder_name(config.folder, chosen)
        if name in configs:
            raise ConfigError(f"sweep has {name!r} twice: give every value once")
        settings = _copy(base_settings)
        for key, value in chosen.items():
            _put(settings, key.split("."), value)
        settings["out"] = str(Path(config.out) / name)
        settings["harvest"]["cache"] = str(config.cache_folder)
        configs[name] = parse_config(settings)
    return _without_unread(configs, axes)


def _without_unread(configs: dict[str, RunConfig], swept: Collection[str]) -> dict[str, RunConfig]:
    """The variants, each without common settings that only the architectures of other variants read.

    Raises:
        ConfigError: no variant reads a setting; or a setting is swept that some do not read, which would give the same
            dictionary twice.
    """
    unread_by = {name: unread(variant.dictionary, variant.train) for name, variant in configs.items()}
    for key in dict.fromkeys(key for keys in unread_by.values() for key in keys):
        names = [name for name, keys in unread_by.items() if key in keys]
        if key in swept or len(names) == len(configs):
            architectures = dict.fromkeys(configs[name].dictionary.architecture for name in names)
            raise no_reader(f"{'sweep.' if key in swept else ''}{key}", unread_by[names[0]][key], architectures)
    return {name: _without(variant, unread_by[name]) for name, variant in configs.items()}


def _without(variant: RunConfig, keys: Collection[str]) -> RunConfig:
    """The variant with the default values of these settings."""
    settings = variant.model_dump(mode="json")
    for key in keys:
        section, _, setting = key.partition(".")
        del settings[section][setting]
    return parse_config(settings) if keys else variant


def sweep(config: RunConfig, progress: Progress = silent) -> Sweep:
    """Harvest missing activations, train every missing variant, evaluate, and compare.

    A variant is a combination of the values under `config.sweep`. Variants are trained in one pass over the
    activations and evaluated in another, at most `config.sweep_at_once` at a time.

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
        with _named(name):
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
        points = {name: _point(run, _variant(config, run.config)) for name, run in trained.items()}
        behind = behind_best(points, {name: load_tensors(run.folder / DOCUMENTS_FILE) for name, run in trained.items()})
        result = Sweep(base.folder, points, failures, behind, _description(base, cache, configs.values()))
        _write(result)
    return result


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the dictionary's name in front of error messages."""
    try:
        yield
    except SaeError as error:
        raise type(error)(f"{name}: {error}") from error


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


def _variant(config: RunConfig, variant: RunConfig) -> str:
    """The swept settings that a point does not name itself."""
    named = ("seed", *(f"dictionary.{name}" for name in ("architecture", "reads", "gives", "d_sae", "k")), *_WEIGHTS)
    settings = variant.model_dump(mode="json")
    parts = []
    for key, _ in _axes(config.sweep):
        section, _, name = key.partition(".")
        if key not in named:
            parts.append(_label(key, settings[section][name]))
    return ", ".join(parts)


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
    widths = dict.fromkeys(f"{cache.d_in(variant.hook)} → {variant.dictionary.d_sae:,}" for variant in configs)
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


def _axes(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _axes(value, f"{path}.")
            continue
        if path != "seed" and path.split(".", maxsplit=1)[0] not in ("dictionary", "train"):
            raise ConfigError(f"sweep.{path}: only keys of dictionary and train, and seed, can be swept")
        if path.removeprefix("train.") in _SHARED:
            raise ConfigError(f"sweep.{path}: all dictionaries of a sweep share one pass, so {path} is one for all")
        if not isinstance(value, (list, tuple)) or not value:
            raise ConfigError(f"sweep.{path}={value!r}: expected a list of values, such as [16, 32]")
        yield path, list(value)


def _folder_name(folder: Path, chosen: Mapping[str, Any]) -> str:
    """The name of a dictionary's folder; the one that earlier versions gave it, if only that is there."""
    name, older = ("-".join(_label(key, value, joint) for key, value in chosen.items()) for joint in ("-", ""))
    return older if stands(folder / older) and not stands(folder / name) else name


def _label(key: str, value: Any, joint: str = "-") -> str:
    """A setting in names of folders and lines: `k16`, `encoder_dtype-float32`, and some values alone.

    Args:
        key: of the setting.
        value: of the setting.
        joint: between name and value, unless the value begins with a digit.
    """
    name = key.rpartition(".")[2]
    text = re.sub(r"[^\w.+]+", "_", str(value)).strip("_")
    if name in ("architecture", "reads", "gives"):
        return text
    return f"{name}{text}" if text[:1].isdigit() else f"{name}{joint}{text}"


def _put(settings: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        settings = settings[key]
    settings[keys[-1]] = value


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree
