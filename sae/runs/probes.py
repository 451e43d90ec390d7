"""Probes a run's dictionary on data sets, resumes after interruptions, and keeps results in `probe.json`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae.activations.manifest import MANIFEST
from sae.dictionary.base import Dictionary
from sae.dictionary.model_identity import has_fingerprint
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ConfigError, DataError, ModelError
from sae.files.writing import locked, stands
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.numerics.seeding import numpy_generator
from sae.probing.absorption import measure_absorption
from sae.probing.activations import LabelledActivations
from sae.probing.data import DataFile, each_name_once, find_data
from sae.probing.examples import Examples, choose_examples
from sae.probing.first_letters import letter_examples
from sae.probing.linear import require_sklearn
from sae.probing.record import FIRST_LETTERS, MARKDOWN_FILE, PROBES, Entry, ProbeRecord
from sae.probing.render import markdown
from sae.probing.settings import LetterConfig, ProbeConfig
from sae.probing.sparse_probes import probe_examples
from sae.runs.labelled import FOLDER, Subject, fingerprint
from sae.runs.run import Run

_EXAMPLE_SETTINGS = ("examples", "max_tokens", "pool", "text", "label", "outside", "seed")
_NOT_IN_RESULT = ("sample",)


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
    A result is reused if dictionary, model, hook point, token policy, the file's bytes and all settings that it depends
    on are the same. Both files are written after every data set, so an interrupted call resumes where it stopped. The
    order of data sets is random, by seed, so partial results are a random sample of them.

    Args:
        run: a run, or its folder.
        data: files, or arguments of `sae.probing.find_data`. If several files have the same bytes, the first is probed,
            with a warning.
        settings: settings of the probes.
        letters: settings for first letters; None to skip them.

    Returns:
        The requested data sets. The files also show results of earlier calls with the same settings; `probe.json` keeps
        those with other settings too, so that later calls can reuse them.

    Raises:
        ConfigError: scikit-learn is not installed; or the dictionary does not record where it was trained, and neither
            do the run's activations.
        DataError: the only data set cannot be probed (if there are several, the reason is recorded and the others are
            probed), or two files would be data sets of the same name.
        ModelError: the language model is not the dictionary's.
    """
    require_sklearn()
    opened_run = run if isinstance(run, Run) else Run.open(run)
    files = [file for entry in data for file in ([entry] if isinstance(entry, DataFile) else find_data([str(entry)]))]
    return _Probing(opened_run, settings or ProbeConfig()).run(each_name_once(files), letters)


class _Probing:
    def __init__(self, run: Run, settings: ProbeConfig) -> None:
        self.run_folder, self.settings, self._run = run.folder, settings, run
        self._tokens_read = 0
        self.dictionary = run.dictionary("cpu")
        self._of = recorded_subject(self.dictionary, run)
        self.subject = self._of.to_json()

    def run(self, data: Sequence[DataFile], letters: LetterConfig | None) -> ProbeRecord:
        with locked(self.run_folder / FOLDER, "probing"):
            files = {file.name: file for file in _in_random_order(_without_copies(data), self.settings)}
            identities = {name: self._identity(file) for name, file in files.items()}
            if letters is not None:
                facts = {"subject": self._subject_hash, "settings": letters.model_dump()}
                identities[FIRST_LETTERS] = fingerprint(facts)
            record = self._arranged(ProbeRecord.read(self.run_folder, self.subject), identities)
            self._run.progress("probes", 0, len(files))
            for number, (name, file) in enumerate(files.items()):
                if name not in record.entries:
                    entry = self._entry(identities[name], lambda file=file: self._probe(file), alone=len(files) == 1)
                    record = self._write(record.with_entry(name, entry))
                self._run.progress("probes", number + 1, len(files))
            if letters is not None and FIRST_LETTERS not in record.entries:
                entry = self._entry(identities[FIRST_LETTERS], lambda: self._measure_letters(letters), alone=True)
                record = record.with_entry(FIRST_LETTERS, entry)
            self._write(record)
        return record.only(identities)

    @property
    def _subject_hash(self) -> str:
        return fingerprint(self.subject)

    def _result_settings(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json", exclude=set(_NOT_IN_RESULT))

    def _identity(self, file: DataFile) -> str:
        facts = {"subject": self._subject_hash, "data": file.sha256(), "settings": self._result_settings()}
        return fingerprint(facts)

    def _entry(self, identity: str, make: Callable[[], Entry], *, alone: bool) -> Entry:
        """The result for a data set, or its failure unless it is the only one."""
        started = time.perf_counter()
        try:
            entry = make()
        except DataError as error:
            if alone:
                raise
            entry = Entry("", self._result_settings(), failure=str(error))
        return replace(entry, identity=identity, seconds=round(time.perf_counter() - started, 3))

    def _arranged(self, record: ProbeRecord, identities: Mapping[str, str]) -> ProbeRecord:
        """The record with the entries to keep.

        Requested entries are kept if their identity is unchanged and they did not fail. Other entries, from earlier
        calls, are kept if they have the same settings, since a table has one kind of probe, and other data, since one
        data set under two names is not two. If only first letters are requested, the existing table stays.
        """
        settings = self._result_settings()
        if not identities.keys() - {FIRST_LETTERS}:
            labelled = (entry.settings for name, entry in record.entries.items() if name != FIRST_LETTERS)
            settings = next(labelled, settings)

        def belongs(name: str, entry: Entry) -> bool:
            if name in identities:
                return entry.identity == identities[name] and entry.failure is None
            return name == FIRST_LETTERS or (entry.settings == settings and entry.identity not in identities.values())

        return record.arranged(belongs)

    def _write(self, record: ProbeRecord) -> ProbeRecord:
        PROBES.write(self.run_folder, record.to_json(), {MARKDOWN_FILE: markdown(record).encode()})
        return record

    def _probe(self, file: DataFile) -> Entry:
        def examples(language_model: LanguageModel) -> Examples:
            texts = file.read(self.settings)
            return choose_examples(texts, language_model.tokenizer, self._of.policy, language_model.bos, self.settings)

        settings = {key: getattr(self.settings, key) for key in _EXAMPLE_SETTINGS}
        activations = self._activations(file.name, {"data": file.sha256(), **settings}, examples)
        result = probe_examples(self.dictionary, activations, self.settings, file.name)
        return Entry("", self._result_settings(), result, left_out=activations.left_out, equal=activations.equal)

    def _measure_letters(self, letters: LetterConfig) -> Entry:
        settings = {key: getattr(letters, key) for key in ("words", "prompt", "seed")}
        activations = self._activations(
            FIRST_LETTERS,
            settings,
            lambda model: letter_examples(model.tokenizer, self._of.policy, model.bos, letters),
        )
        absorption = measure_absorption(self.dictionary, activations, letters, "first letters")
        return Entry(
            "", letters.model_dump(),
            letters={
                "able": len(absorption.able),
                "means": {name: absorption.mean(name) for name in ("rate", "silent_rate", "splits")},
                "concepts": [concept.to_json() for concept in absorption.concepts],
            },
        )  # fmt: skip

    def _activations(
        self, name: str, example_facts: dict[str, Any], examples: Callable[[LanguageModel], Examples]
    ) -> LabelledActivations:
        """Activations read by the language model, or kept from an earlier call."""
        before = self._tokens_read

        def progress(done: int, total: int) -> None:
            self._tokens_read = before + done
            self._run.progress("activations", before + done, before + total)

        return self._of.activations(
            name, example_facts, examples, lambda: self._run.language_model, self.run_folder / FOLDER, progress
        )


def recorded_subject(dictionary: Dictionary, run: Run) -> Subject:
    """A run's dictionary, with the hook point, token policy and model that it was trained with.

    Files of other toolkits do not identify the model. Then model and token policy are those of the run's activations.

    Raises:
        ConfigError: it does not record them.
        ModelError: the run's language model is another one.
    """
    origin = dictionary.origin
    hook, model, tokens = origin.reads.hook, origin.models.get("", {}), origin.tokens
    is_whole = model.get("weights_sha256") is not None and isinstance(tokens, dict)
    if hook is None or not (is_whole or stands(run.config.cache_folder / MANIFEST)):
        raise ConfigError(
            f"run {str(run.folder)!r}: its dictionary does not record which model, hook point and tokens it was "
            "trained on; probe it in Python with your own activations: sae.probe(dictionary, activations, labels)"
        )
    if not is_whole:
        cache = run.cache()
        model = {**cache.manifest.model, **{key: value for key, value in model.items() if value is not None}}
        tokens = cache.policy.to_json()
    if has_fingerprint(run.config.model.name, model.get("fingerprint")) is False:
        raise ModelError(
            f"model {run.config.model.name!r}: its weights are not those that the dictionary was trained on "
            f"({model.get('name')!r}); give that model with model.name=PATH"
        )
    return Subject(dictionary, hook, TokenPolicy.from_json(tokens), model)


def _without_copies(data: Sequence[DataFile]) -> list[DataFile]:
    """The data sets without copies: of files with the same bytes the first, and a warning about the others.

    Raises:
        DataError: a file cannot be read, or its name is reserved for first letters.
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
