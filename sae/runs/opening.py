"""Opens what a user names as a run: a run folder, or any dictionary, for which a run folder is made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from sae.activations.cache import ActivationCache
from sae.activations.harvest import harvest as harvest_activations
from sae.activations.harvest import hook_widths
from sae.config.file import CONFIG_YAML
from sae.config.progress import Progress, announce, silent, within
from sae.config.settings import RunConfig
from sae.config.sources import ModelConfig
from sae.dictionary.base import CONFIG_FILE, Dictionary
from sae.dictionary.model_identity import model_label
from sae.dictionary.origin import check_belongs
from sae.dictionary.saved import identify
from sae.errors import ConfigError, ModelError
from sae.files.paths import expanded
from sae.files.writing import locked, stands
from sae.formats import load
from sae.model.language_model import LanguageModel
from sae.runs.adoption import activations_key, at_hooks, config_of, divided, folder_name, words_of
from sae.runs.folder import DICTIONARY, configured, open_config
from sae.runs.run import Run

Named = str | Path | Dictionary
"""A run folder, what `sae.load` takes, or a dictionary."""


def open_run(
    place: Named,
    overrides: Sequence[str] = (),
    *,
    model: str | Path | ModelConfig | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    hook: str | None = None,
    target: str | None = None,
    out: str | Path | None = None,
    needs_texts: bool = True,
    progress: Progress | None = None,
) -> Run:
    """Open a run folder, or make one for a dictionary of any toolkit, so that everything works on it as on any run.

    For a dictionary, `data` says on which texts it is measured. Hook points, context length, BOS, masked positions and
    weight processing follow from what its files say about its training; activations are harvested, and the dictionary
    is saved next to them in this package's format. The folder gets its `config.yaml` last. An interrupted call
    resumes; the same call opens the folder that it made before.

    Args:
        place: a run folder, what `sae.load` takes, or a dictionary. A run folder with `data`: its dictionary is
            measured on these texts, in another folder.
        overrides: KEY=VALUE settings of the run, such as `data.held_out_tokens=20000`.
        model: the language model; None: the one that the dictionary's files name.
        data: text files, folders or data sets, as in `data.source`; None: `place` is a run folder.
        hook: hook point that the dictionary reads, if its files do not say it.
        target: hook point that a transcoder gives, if its files do not say it.
        out: the run folder; None: one in `runs/`, named after the dictionary and a hash of all that decides the
            activations, so that other arguments get another folder.
        needs_texts: if false, `data` may be None for a dictionary too. The run then has a dictionary and a model, but
            neither folder nor activations.
        progress: called with (stage, tokens done, tokens in total).

    Raises:
        ConfigError: an argument is missing, or contradicts the dictionary's files or the folder.
        FormatError: there is no dictionary, or one that cannot be used here.
        ModelError: the model cannot be loaded, or is not the dictionary's.
        CacheError: the folder was made with other settings, or cannot be written.
        DataError: the texts cannot be read, or are too short.
    """
    request = Request(model, _listed(data), hook, target, out, tuple(overrides), progress or silent)
    return Opener(request).open(place, needs_texts=needs_texts)


def open_runs(
    places: Sequence[Named],
    overrides: Sequence[str] = (),
    *,
    model: str | Path | ModelConfig | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    hook: str | None = None,
    target: str | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Run]:
    """`open_run` for several: the model is loaded once, and dictionaries with the same settings share activations.

    Raises:
        ConfigError: `out` names one folder for several dictionaries.
        SaeError: as `open_run`.
    """
    if out is not None and len(places) > 1:
        raise ConfigError(f"--out names one folder for {len(places)} dictionaries: leave it out (out=None in Python)")
    opener = Opener(Request(model, _listed(data), hook, target, out, tuple(overrides), progress or silent))
    return [opener.open(place) for place in places]


def _listed(data: str | Path | Sequence[str | Path] | None) -> tuple[str, ...]:
    return () if data is None else tuple(map(str, [data] if isinstance(data, str | Path) else data))


@dataclass(frozen=True)
class Request:
    """What a user gives besides dictionaries; the arguments of `open_run`."""

    model: str | Path | ModelConfig | None
    data: tuple[str, ...]
    hook: str | None
    target: str | None
    out: str | Path | None
    overrides: tuple[str, ...]
    progress: Progress

    @property
    def words(self) -> list[str]:
        """All settings that the user chose, as KEY=VALUE."""
        return [*words_of(self.model, self.data), *self.overrides]


@dataclass
class Opener:
    """Opens runs for one request; models and caches are shared among them.

    Attributes:
        request: what the user gives.
        caches: folders of caches made so far, by `activations_key`.
        models: language models loaded so far.
    """

    request: Request
    caches: dict[str, Path] = field(default_factory=dict)
    models: dict[tuple[ModelConfig, torch.device], LanguageModel] = field(default_factory=dict)

    def open(self, place: Named, *, needs_texts: bool = True) -> Run:
        """The run of a run folder or dictionary; see `open_run`."""
        request = self.request
        if not request.data:
            options = ("model", "hook", "target", "out")
            given = [name for name in options if getattr(request, name) is not None]
            if not isinstance(place, Dictionary) and (_is_run(place) or (needs_texts and not given)):
                if given:
                    raise ConfigError(
                        f"run {str(place)!r}: has a model and texts of its own, so --{given[0]} has no effect; to "
                        "measure its dictionary on other texts, give them with --data"
                    )
                return Run.open(place, request.overrides, request.progress)
            if needs_texts:
                raise ConfigError(
                    f"{_name(place)}: to measure a dictionary, give texts with --data, such as --data texts.txt "
                    "(data=... in Python)"
                )
        dictionary = at_hooks(
            copy.deepcopy(place) if isinstance(place, Dictionary) else load(place), _name(place),
            request.hook, request.target,
        )  # fmt: skip
        config = config_of(dictionary, _name(place), request.words)
        if not request.data:
            return _Unsaved(config, dictionary, request.progress)
        return self._adopted(place, dictionary, config)

    def _adopted(self, place: Named, dictionary: Dictionary, config: RunConfig) -> Run:
        """The run folder of a dictionary, made if it does not exist."""
        out = self.request.out or (config.out if "out" in config.model_fields_set else None)
        folder = expanded(out or Path("runs", folder_name(place, dictionary, config)))
        config = config.model_copy(update={"out": str(folder)})
        shared = self.caches.get(activations_key(config))
        if shared is not None and config.harvest.cache is None:
            harvest = config.harvest.model_copy(update={"cache": str(shared)})
            config = config.model_copy(update={"harvest": harvest})
        _check_dictionary(folder, dictionary)
        run = self._reopened(config) if stands(folder / CONFIG_YAML) else self._made(dictionary, config)
        self.caches.setdefault(activations_key(config), run.config.cache_folder)
        return run

    def _made(self, dictionary: Dictionary, config: RunConfig) -> Run:
        """The run folder, whose `config.yaml` is written last: if it stands, so does the rest."""
        run = self._run(divided(config, self.request.progress))
        self._check_model(dictionary, run)
        with locked(run.folder, "preparation of a run"):
            if stands(run.folder / CONFIG_YAML):  # made by another process in the meantime
                return self._reopened(config)
            run.progress("read text", 0, 1)  # until the harvest reports for the first time
            harvest_activations(run.config, run.language_model, within(run.progress, "harvest"))
            _check_dictionary(run.folder, dictionary)
            dictionary.save(run.folder / DICTIONARY)
            with configured(run.config):
                announce(run.progress, f"made run {str(run.folder)!r}: other commands take it too, without --data")
        return run

    def _reopened(self, requested: RunConfig) -> Run:
        """The run folder made before, with this request's settings, if its activations are those that are asked for."""
        folder = requested.folder
        run = self._run(open_config(folder, self.request.words))
        for key, hook, other in (
            ("reads", run.config.hook, requested.hook),
            ("gives", run.config.gives, requested.gives),
        ):
            if hook != other:
                raise ConfigError(
                    f"run {str(folder)!r}: made with dictionary.{key}={hook!r}, now {other!r} is asked for; choose "
                    "another folder (--out)"
                )
        run.harvest()  # what is missing
        return run

    def _run(self, config: RunConfig) -> Run:
        run = Run(config, self.request.progress)
        key = (config.model, run.device)
        if key in self.models:
            run.language_model = self.models[key]
        return run

    def _check_model(self, dictionary: Dictionary, run: Run) -> None:
        """Refuse a model that is not the dictionary's, before anything is harvested."""
        trained_on = dictionary.origin.models.get("", {}).get("name")
        try:
            language_model = run.language_model
        except ModelError as error:
            if self.request.model is not None:
                raise
            raise ModelError(f"{error} (the dictionary's files name this model; give another with --model)") from error
        self.models[run.config.model, run.device] = language_model
        info, widths = language_model.info, hook_widths(run.config, language_model)
        place = replace(language_model.as_place, width=widths.__getitem__, weights_in=None)  # caches compare hashes
        check_belongs(dictionary.origin, place, reads=run.config.hook, gives=run.config.gives)
        if isinstance(trained_on, str) and _last(trained_on) != _last(info.name):
            announce(
                run.progress,
                f"the dictionary's files name the model {trained_on!r}; it is measured on {info.name!r}, whose width "
                "is the same",
            )


class _Unsaved(Run):
    """A dictionary and its language model, without a folder: for what needs no activations."""

    def __init__(self, config: RunConfig, dictionary: Dictionary, progress: Progress) -> None:
        super().__init__(config, progress)
        self._loaded = dictionary

    def dictionary(self, device: str | torch.device | None = None) -> Dictionary:
        return self._loaded.to(device or self.device)

    def cache(self, *, text: bool = False) -> ActivationCache:
        raise ConfigError("a dictionary without texts: give them with --data (data=... in Python)")


def _check_dictionary(folder: Path, dictionary: Dictionary) -> None:
    """Refuse a folder that holds another dictionary, or a run without one.

    Raises:
        ConfigError: the message names the folder.
    """
    if stands(folder / DICTIONARY / CONFIG_FILE):
        if identify(load(folder / DICTIONARY)) != identify(dictionary):
            raise ConfigError(f"run {str(folder)!r}: holds another dictionary; choose another folder (--out)")
    elif stands(folder / CONFIG_YAML):
        raise ConfigError(f"run {str(folder)!r}: its dictionary is not trained yet; choose another folder (--out)")


def _is_run(place: str | Path) -> bool:
    return stands(expanded(place) / CONFIG_YAML)


def _name(place: Named) -> str:
    return "dictionary" if isinstance(place, Dictionary) else f"dictionary {str(place)!r}"


def _last(name: str) -> str:
    """The last part of a model's name, in small letters."""
    return model_label(name).rpartition("/")[2].lower()
