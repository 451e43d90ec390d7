"""Compares dictionaries in folders on one run's held-out tokens, and reuses existing results."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.config.file import CONFIG_YAML
from sae.config.progress import Progress, announce, silent, under
from sae.dictionary.base import Dictionary
from sae.dictionary.saved import identify
from sae.errors import CacheError, ConfigError
from sae.evaluation import Comparison, evaluate_all, write_comparison
from sae.evaluation.budget import announcement
from sae.evaluation.comparison import check_several, comparison_key
from sae.evaluation.partial import discard
from sae.evaluation.stored import read_comparison, read_stored
from sae.files.paths import expanded
from sae.files.writing import locked, stands
from sae.formats import load
from sae.hub import Snapshot, located
from sae.runs.adoption import at_hooks
from sae.runs.opening import open_run
from sae.runs.run import Run

READ = "read dictionaries"
"""The stage that counts dictionaries instead of tokens."""
_UNFINISHED = "comparison-unfinished"
Evaluation = tuple[dict[str, Any], dict[str, Tensor]]


def compare_folders(
    places: Sequence[str | Path], *, on: str | Path | None = None, out: str | Path | None = None,
    overrides: tuple[str, ...] = (), model: str | Path | None = None, data: Sequence[str | Path] = (),
    hook: str | None = None, target: str | None = None, progress: Progress | None = None,
) -> Comparison:  # fmt: skip
    """Compare the dictionaries of several folders on the held-out tokens of one run.

    Args:
        places: run folders, dictionaries' folders, or names of the hub; the others are compared with the first.
        on: run folder whose activations, model and evaluation settings are used; None for the first in `places`.
        model, data: a language model and texts: `sae.open_run` makes a run folder for the first dictionary, and all are
            compared on its held-out tokens. Then `on` is None.
        hook, target: hook points of the dictionaries whose files do not say them.
        out: folder for `compare.md` and `compare.json`; if it already holds the same comparison, that is read.
        overrides: overrides of that run's configuration.
        progress: called with (stage, tokens done, tokens in total).

    An interrupted evaluation resumes: its sums are kept in `comparison-unfinished/` in `out`, or if that is None in the
    run folder that the tokens come from. If the folder cannot be written, they are not kept.

    Raises:
        ConfigError: there are fewer than two dictionaries, one is named twice, or none is in a run folder and there are
            no texts.
        CacheError: another process is writing to `out`.
        SaeError: loading or evaluating fails.
    """
    named = named_places(places)
    check_several(named)
    report = progress or silent
    if data or model:
        if on is not None:
            raise ConfigError("--on names the run that supplies texts and model: leave --data and --model out")
        first = next(iter(named))
        run = open_run(places[0], overrides, model=model, data=data or None, hook=hook, target=target, progress=report)
        named[first] = run.folder  # with its evaluation, if there is one
    else:
        run = _run(named, on, overrides, report)
    cache, site, settings = run.cache(), run.config.gives, run.config.evaluation
    dictionaries, identities = _loaded(named, hook, target, report)
    activations = cache.manifest.identity(site)
    key = comparison_key(identities, activations, site, settings)

    def compare() -> Comparison:
        evaluations: dict[str, Evaluation | None] = {
            name: read_stored(place, identities[name], activations, hook=site, settings=settings)
            for name, place in named.items()
        }
        missing = {name: dictionaries[name] for name, stored in evaluations.items() if stored is None}
        if missing:
            with unfinished_folder(expanded(out or run.folder) / _UNFINISHED, "comparison") as unfinished:
                evaluations |= _evaluate(run, cache, missing, report, unfinished)
        return Comparison.of({name: stored for name, stored in evaluations.items() if stored is not None})

    if out is None:
        return compare()
    stored_comparison = read_comparison(out, key)
    if stored_comparison is not None:
        return stored_comparison
    with locked(expanded(out), "comparison"):
        comparison = compare()
        write_comparison(comparison, out)
    return comparison


def _loaded(
    named: Mapping[str, Path], hook: str | None, target: str | None, progress: Progress
) -> tuple[dict[str, Dictionary], dict[str, dict[str, Any]]]:
    """The dictionaries, at the hook points given for those that state none, and their identities."""
    dictionaries, identities = {}, {}
    progress(READ, 0, len(named))
    for name, place in named.items():
        dictionaries[name] = load(place)
        if hook is not None and dictionaries[name].origin.reads.hook is None:
            at_hooks(dictionaries[name], f"dictionary {str(place)!r}", hook, target)
        identities[name] = identify(dictionaries[name])
        progress(READ, len(identities), len(named))
    return dictionaries, identities


@contextlib.contextmanager
def unfinished_folder(folder: Path, doing: str) -> Iterator[Path | None]:
    """The folder for the sums of an unfinished evaluation; None if it is not writable, or another process uses it."""
    unfinished: Path | None = folder
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, doing))
        except CacheError:
            unfinished = None
        yield unfinished
        if unfinished is not None:
            discard(unfinished)


def _evaluate(
    run: Run, cache: ActivationCache, dictionaries: Mapping[str, Dictionary], progress: Progress,
    unfinished: Path | None,
) -> dict[str, Evaluation]:  # fmt: skip
    announce(progress, announcement(run.config.evaluation, cache, dictionaries.values()))
    reports = evaluate_all(
        dictionaries, cache,
        hook=run.config.gives, language_model=run.language_model, settings=run.config.evaluation, device=run.device,
        progress=under(progress, "evaluate"), unfinished=unfinished,
    )  # fmt: skip
    return {name: (report.to_json(), report.scores.totals) for name, report in reports.items()}


def _run(
    named: Mapping[str, Path], on: str | Path | None, overrides: tuple[str, ...], progress: Progress
) -> Run:  # fmt: skip
    """The run that the held-out tokens come from."""
    if on is not None:
        return Run.open(on, overrides, progress)
    for place in named.values():
        if stands(place / CONFIG_YAML):
            return Run.open(place, overrides, progress)
    raise ConfigError(
        f"{', '.join(map(repr, map(str, named.values())))}: none is a run folder, so there are no held-out tokens to "
        "compare them on; name a run with --on RUN (on=... in Python), or give --model and --data"
    )


def named_places(places: Sequence[str | Path]) -> dict[str, Path]:
    """Folders by name: the shortest ends of their paths that differ; those of the hub by theirs."""
    paths = [located(place) for place in places]
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise ConfigError(f"{str(places[number])!r} is named twice: give every dictionary once")
    for length in range(1, max(len(path.parts) for path in resolved) + 1 if resolved else 1):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(names):
            named = zip(places, names, paths, strict=True)
            return {str(place) if Snapshot.of(path) else name: path for place, name, path in named}
    return {str(path): path for path in paths}
