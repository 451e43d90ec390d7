"""A run folder and data sets in; probes of its dictionary out, kept in `probe.json`, resumed and never stale."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae.dictionary.base import Dictionary
from sae.dictionary.model_identity import has_fingerprint
from sae.dictionary.origin import Place, check_belongs
from sae.dictionary.saved import identify
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ConfigError, DataError, ModelError
from sae.files.formats import as_read_back, fingerprint_of
from sae.files.writing import locked, write_bytes
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import numpy_generator
from sae.probing.absorption import measure_absorption
from sae.probing.activations import LabelledActivations, load_activations, read_activations, save_activations
from sae.probing.data import DataFile, each_name_once, find_data
from sae.probing.examples import Examples, choose_examples
from sae.probing.first_letters import letter_examples
from sae.probing.linear import require_sklearn
from sae.probing.record import FIRST_LETTERS, MARKDOWN_FILE, Entry, ProbeRecord
from sae.probing.render import markdown
from sae.probing.settings import LetterConfig, ProbeConfig
from sae.probing.sparse_probes import probe_examples
from sae.runs.pipeline import Run

FOLDER = "probing"
_OF_MODEL = ("weights_sha256", "weight_processing", "dtype", "tokenizer_sha256")
_OF_EXAMPLES = ("examples", "max_tokens", "pool", "text", "label", "outside", "seed")
_NOT_OF_RESULT = ("sample",)


@in_own_modes
def probe_run(
    run: Run | str | Path,
    data: Sequence[DataFile | str | Path],
    settings: ProbeConfig | None = None,
    *,
    letters: LetterConfig | None = None,
) -> ProbeRecord:
    """Probe a run's dictionary on data sets, and measure first letters; write `probe.json` and `probe.md`.

    The language model reads each data set once: activations at the examples are kept in `probing/` in the run folder.
    A result is used again if dictionary, model, hook point, token policy, the file's bytes and all settings that it
    depends on are the same; else it is made anew. After every data set both files are written, so an interrupted call
    goes on where it stopped. Data sets are taken in an order drawn by seed: what is there at any time is a random
    sample of them.

    Args:
        run: a run, or its folder.
        data: what to probe: files, or what `sae.probing.find_data` takes. Of files of the same bytes the first is
            probed, with a warning.
        settings: of the probes.
        letters: measure first letters, with these settings; None: don't.

    Returns:
        The data sets that were asked for. The files show what earlier calls made with the same settings as well;
        `probe.json` keeps what they made with others, for calls that ask for it again.

    Raises:
        ConfigError: scikit-learn is not installed, or the dictionary does not say where it was trained.
        DataError: a single data set cannot be probed; of several the others are, and the reason is recorded. Or two
            files would be data sets of one name.
        ModelError: the language model is not the dictionary's.
    """
    require_sklearn()
    whole = run if isinstance(run, Run) else Run.open(run)
    files = [file for one in data for file in ([one] if isinstance(one, DataFile) else find_data([str(one)]))]
    return _Probing(whole, settings or ProbeConfig()).run(each_name_once(files), letters)


class _Probing:
    def __init__(self, run: Run, settings: ProbeConfig) -> None:
        self.run_folder, self.settings, self._run = run.folder, settings, run
        self._tokens_read = 0
        self.dictionary = run.dictionary("cpu")
        self.hook, self.policy, self.model = _origin(self.dictionary, run)
        subject = {
            "dictionary": identify(self.dictionary),
            "model": {key: self.model.get(key) for key in ("name", *_OF_MODEL)},
            "hook": self.hook,
            "token_policy": self.policy.to_json(),
        }
        self.subject: dict[str, Any] = as_read_back(subject)

    def run(self, data: Sequence[DataFile], letters: LetterConfig | None) -> ProbeRecord:
        with locked(self.run_folder / FOLDER, "probing"):
            files = {file.name: file for file in _in_random_order(_without_copies(data), self.settings)}
            asked = {name: self._identity(file) for name, file in files.items()}
            if letters is not None:
                asked[FIRST_LETTERS] = fingerprint_of({"subject": self._subject_hash, "settings": letters.model_dump()})
            record = self._arranged(ProbeRecord.read(self.run_folder, self.subject), asked)
            self._run.progress("probes", 0, len(files))
            for number, (name, file) in enumerate(files.items()):
                if name not in record.entries:
                    entry = self._entry(asked[name], lambda file=file: self._probed(file), alone=len(files) == 1)
                    record = self._written(record.with_entry(name, entry))
                self._run.progress("probes", number + 1, len(files))
            if letters is not None and FIRST_LETTERS not in record.entries:
                entry = self._entry(asked[FIRST_LETTERS], lambda: self._lettered(letters), alone=True)
                record = record.with_entry(FIRST_LETTERS, entry)
            self._written(record)
        return record.only(asked)

    @property
    def _subject_hash(self) -> str:
        return fingerprint_of(self.subject)

    def _kept_settings(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json", exclude=set(_NOT_OF_RESULT))

    def _identity(self, file: DataFile) -> str:
        facts = {"subject": self._subject_hash, "data": file.sha256(), "settings": self._kept_settings()}
        return fingerprint_of(facts)

    def _entry(self, identity: str, make: Callable[[], Entry], *, alone: bool) -> Entry:
        """What comes of a data set; its failure where there are others."""
        started = time.perf_counter()
        try:
            made = make()
        except DataError as error:
            if alone:
                raise
            made = Entry("", self._kept_settings(), failure=str(error))
        return replace(made, identity=identity, seconds=round(time.perf_counter() - started, 3))

    def _arranged(self, record: ProbeRecord, asked: Mapping[str, str]) -> ProbeRecord:
        """Entries: of what is asked for what is the same in everything and no failure; of the rest, which earlier calls
        left, what was probed with the same settings, since one table has one kind of probe, and is of other data, since
        data of two names are no two data sets. Where first letters alone are asked for, that is the table there is.
        """
        settings = self._kept_settings()
        if not asked.keys() - {FIRST_LETTERS}:
            labelled = (entry.settings for name, entry in record.entries.items() if name != FIRST_LETTERS)
            settings = next(labelled, settings)

        def belongs(name: str, entry: Entry) -> bool:
            if name in asked:
                return entry.identity == asked[name] and entry.failure is None
            return name == FIRST_LETTERS or (entry.settings == settings and entry.identity not in asked.values())

        return record.arranged(belongs)

    def _written(self, record: ProbeRecord) -> ProbeRecord:
        write_bytes(self.run_folder / MARKDOWN_FILE, markdown(record).encode())
        record.write(self.run_folder)
        return record

    def _probed(self, file: DataFile) -> Entry:
        def examples(language_model: LanguageModel) -> Examples:
            texts = file.read(self.settings)
            return choose_examples(texts, language_model.tokenizer, self.policy, language_model.bos, self.settings)

        settings = {key: getattr(self.settings, key) for key in _OF_EXAMPLES}
        activations = self._activations(file.name, {"data": file.sha256(), **settings}, examples)
        result = probe_examples(self.dictionary, activations, self.settings, file.name)
        return Entry("", self._kept_settings(), result, left_out=activations.left_out, equal=activations.equal)

    def _lettered(self, letters: LetterConfig) -> Entry:
        read = {key: getattr(letters, key) for key in ("words", "prompt", "seed")}
        activations = self._activations(
            FIRST_LETTERS,
            read,
            lambda model: letter_examples(model.tokenizer, self.policy, model.bos, letters),
        )
        found = measure_absorption(self.dictionary, activations, letters, "first letters")
        return Entry(
            "", letters.model_dump(),
            letters={
                "able": len(found.able),
                "means": {name: found.mean(name) for name in ("rate", "silent_rate", "splits")},
                "concepts": [concept.to_json() for concept in found.concepts],
            },
        )  # fmt: skip

    def _activations(
        self, name: str, of_examples: dict[str, Any], examples: Callable[[LanguageModel], Examples]
    ) -> LabelledActivations:
        """Read by the language model, or kept from an earlier time."""
        of_model = {key: self.subject[key] for key in ("model", "hook", "token_policy")}
        key = fingerprint_of({**of_model, "model": {**of_model["model"], "name": None}, "examples": of_examples})
        folder = self.run_folder / FOLDER
        held = load_activations(folder, name, key)
        if held is not None:
            return held
        language_model = self._run.language_model
        info = language_model.info
        here = Place(f"model {info.name!r}", info.to_json(), ModelError, model_keys=_OF_MODEL)
        check_belongs(self.dictionary, here, reads=self.hook)
        before = self._tokens_read

        def progress(done: int, total: int) -> None:
            self._tokens_read = before + done
            self._run.progress("activations", before + done, before + total)

        made = read_activations(language_model, self.hook, examples(language_model), progress)
        save_activations(made, folder, name, key)
        return made


def _origin(dictionary: Dictionary, run: Run) -> tuple[str, TokenPolicy, dict[str, Any]]:
    """Hook point, token policy and model that a dictionary was trained with."""
    try:
        origin = dictionary.metadata
        hook, policy, model = origin["hook"], TokenPolicy.from_json(origin["tokens"]), dict(origin["model"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"run {str(run.folder)!r}: its dictionary does not say on which model, hook point and tokens it was "
            "trained; probe it in Python with activations of your own: sae.probe(dictionary, activations, labels)"
        ) from error
    if has_fingerprint(run.config.model.name, model.get("fingerprint")) is False:
        raise ModelError(
            f"model {run.config.model.name!r}: its weights are not those that the dictionary was trained on "
            f"({model.get('name')!r}); give that model with model.name=PATH"
        )
    return hook, policy, model


def _without_copies(data: Sequence[DataFile]) -> list[DataFile]:
    """Of files of the same bytes the first; of the others a warning says which that is.

    Raises:
        DataError: one cannot be read, or is called as first letters are.
    """
    firsts: dict[tuple[str, str], DataFile] = {}
    for file in data:
        if file.name == FIRST_LETTERS:
            raise DataError(f"data {str(file.path)!r}: {FIRST_LETTERS!r} is another measurement; rename the file")
        first = firsts.setdefault((file.path.suffix, file.sha256()), file)
        if first is not file:
            warnings.warn(
                f"data {str(file.path)!r}: the same bytes as {str(first.path)!r}; probed once, as {first.name!r}",
                stacklevel=4,
            )
    return list(firsts.values())


def _in_random_order(data: Sequence[DataFile], settings: ProbeConfig) -> list[DataFile]:
    order = numpy_generator("probes: data sets", settings.seed).permutation(len(data))
    return [data[number] for number in order][: settings.sample]
