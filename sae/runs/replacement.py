"""Measures the language model with modules replaced by the transcoders of several folders, and reuses results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sae.config.file import CONFIG_YAML
from sae.config.progress import Progress, announce, silent, under
from sae.dictionary.base import CONFIG_FILE, Dictionary
from sae.errors import ConfigError
from sae.evaluation import ReplacementReport, measure_replacement, read_replacement, write_replacement
from sae.evaluation.replacement import replacement_cost, replacement_key
from sae.files.paths import expanded, resolve
from sae.files.reading import read_object, taken_apart
from sae.files.writing import locked, stands
from sae.formats import dictionaries_in, load
from sae.hub import located
from sae.runs.comparison import READ, named_places, unfinished_folder
from sae.runs.folder import DICTIONARY, open_config
from sae.runs.opening import open_run
from sae.runs.run import Run
from sae.runs.sweeping import SWEEP

_UNFINISHED = "replacement-unfinished"


def replace(
    places: str | Path | Sequence[str | Path], *, on: str | Path | None = None, out: str | Path | None = None,
    overrides: Sequence[str] = (), model: str | Path | None = None, data: str | Path | Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> ReplacementReport:  # fmt: skip
    """Measure a language model with its modules replaced by transcoders; see `measure_replacement`.

    Args:
        places: run folders, dictionaries' folders or names of the hub, each of a transcoder; or folders that hold
            several, such as a sweep or a circuit-tracer set.
        on: run folder whose held-out tokens, model and evaluation settings are used; None for the first in `places`.
        out: folder for `replacement.md` and `replacement.json`; if it already holds the same report, that is read.
            None: `places` if that is a single folder of a run or a sweep, else nothing is written.
        overrides: overrides of that run's configuration.
        model, data: a language model and texts: `sae.open_run` makes a run folder for the first transcoder, and all are
            measured on its held-out tokens. Then `on` is None.
        progress: called with (stage, done, total).

    An interrupted measurement resumes: its sums are kept in `replacement-unfinished/` in `out`, or if that is None in
    the run folder that the tokens come from.

    Raises:
        ConfigError: there is no transcoder, one is named twice, or none is in a run folder and there are no texts; or
            a sweep is not finished, or lacks a dictionary that it trained.
        CacheError: another process is writing to `out`.
        SaeError: loading or measuring fails.
    """
    places = [places] if isinstance(places, str | Path) else list(places)
    texts, report = ([data] if isinstance(data, str | Path) else list(data)), progress or silent
    folders = [folder for place in places for folder in _folders(place, report)]
    if not folders:
        raise ConfigError("there is no transcoder to replace a module with: name a run, or a folder of several")
    named, out = named_places(folders), out_folder(places, out)
    if texts or model:
        if on is not None:
            raise ConfigError("--on names the run that supplies texts and model: leave --data and --model out")
        run = open_run(folders[0], list(overrides), model=model, data=texts or None, progress=report)
    else:
        run = _run(list(named.values()), on, tuple(overrides), report)
    dictionaries: dict[str, Dictionary] = {}
    report(READ, 0, len(named))
    for name, place in named.items():
        dictionaries[name] = load(place).requires_grad_(False)
        report(READ, len(dictionaries), len(named))
    cache, settings = run.cache(), run.config.evaluation

    def measure() -> ReplacementReport:
        announce(report, replacement_cost(list(dictionaries.values()), cache, settings, run.device))
        with unfinished_folder(expanded(out or run.folder) / _UNFINISHED, "replacement") as unfinished:
            return measure_replacement(
                dictionaries, cache, run.language_model,
                settings=settings, device=run.device, progress=under(report, "replace"), unfinished=unfinished,
            )  # fmt: skip

    if out is None:
        return measure()
    stored = read_replacement(out, replacement_key(dictionaries, cache, settings))
    if stored is not None:
        return stored
    with locked(out, "replacement"):
        result = measure()
        write_replacement(result, out)
    return result


def out_folder(places: Sequence[str | Path], out: str | Path | None) -> Path | None:
    """The folder that results are written to; None: they are not."""
    if out is not None:
        return expanded(out)
    [place, *others] = map(expanded, places)
    is_ours = stands(place / SWEEP.index) or resolve(place, DICTIONARY, CONFIG_FILE) is not None
    return place if not others and is_ours and stands(place / CONFIG_YAML) else None


def _folders(place: str | Path, progress: Progress) -> list[str | Path]:
    """The place itself if it is a dictionary's; those of a sweep; or the dictionaries in it."""
    folder = located(place)
    if resolve(folder, DICTIONARY, CONFIG_FILE) is not None:
        return [place]
    if stands(folder / SWEEP.index):
        return [*_trained(folder, progress)]
    names = dictionaries_in(folder)
    ours = stands(folder / CONFIG_YAML) and any(stands(folder / name / CONFIG_YAML) for name in names)
    if ours and open_config(folder).sweep:
        raise ConfigError(
            f"sweep {str(place)!r}: not finished, it has no {SWEEP.index}; run the same 'sae sweep' again"
        )
    return [folder / name for name in names] or [place]


def _trained(sweep: Path, progress: Progress) -> list[Path]:
    """The run folders that a sweep trained, by its own record; folders of an older sweep are not among them."""
    record = read_object(sweep / SWEEP.index)
    with taken_apart(sweep / SWEEP.index):
        names, failures = list(record["points"].keys()), dict(record["failures"])
    missing = [name for name in names if resolve(sweep / name, DICTIONARY, CONFIG_FILE) is None]
    if missing:
        raise ConfigError(
            f"sweep {str(sweep)!r}: {', '.join(missing)} of its {SWEEP.index} have no dictionary; run the same "
            "'sae sweep' again, or name the runs that are there"
        )
    if failures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        announce(progress, f"sweep {str(sweep)!r}: {len(failures)} failed and replace nothing ({reasons})")
    return [sweep / name for name in names]


def _run(folders: Sequence[Path], on: str | Path | None, overrides: tuple[str, ...], progress: Progress) -> Run:
    """The run that the held-out tokens come from."""
    source = on or next((folder for folder in folders if stands(folder / CONFIG_YAML)), None)
    if source is not None:
        return Run.open(source, overrides, progress)
    names = ", ".join(repr(str(folder)) for folder in folders[:3]) + (", …" if len(folders) > 3 else "")
    raise ConfigError(
        f"{names}: none is a run folder, so there are no held-out tokens; name a run with --on RUN (on=... in Python), "
        "or give --model and --data"
    )
