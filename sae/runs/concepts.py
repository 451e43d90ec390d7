"""Finds a dictionary's features for a concept that a user shows by texts, by labels, or by a word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sae.config.file import CONFIG_YAML
from sae.config.progress import Progress, silent, within
from sae.config.sources import ModelConfig
from sae.dictionary.base import Dictionary
from sae.dictionary.origin import check_belongs
from sae.dictionary.token_policy import TokenPolicy
from sae.errors import ConfigError, DataError
from sae.files.paths import expanded
from sae.files.writing import locked, stands
from sae.formats import load
from sae.model.language_model import LanguageModel
from sae.numerics.modes import in_own_modes
from sae.probing.concepts import ConceptSearch, concept_label, find_in_examples
from sae.probing.contrasts import WITH, WITHOUT, Texts, contrast, tokens_of_word
from sae.probing.data import LabelledTexts, find_data
from sae.probing.examples import Examples, choose_examples
from sae.probing.settings import ConceptConfig
from sae.runs.labelled import FOLDER, Subject, fingerprint
from sae.runs.probes import recorded_subject
from sae.runs.run import Run

_WAYS = (
    "give texts with and without the concept (--with FILE --without FILE), a word and texts that have it (--word WORD "
    "--texts FILE), or a file of labelled texts"
)


@in_own_modes
def find(
    dictionary: Run | Dictionary | str | Path,
    having: Texts | None = None,
    lacking: Texts | None = None,
    *,
    word: str | None = None,
    texts: Texts | None = None,
    data: str | Path | None = None,
    model: LanguageModel | ModelConfig | str | Path | None = None,
    settings: ConceptConfig | None = None,
    progress: Progress = silent,
) -> ConceptSearch:
    """Find the features of a dictionary for a concept.

    The concept is shown in one of three ways: texts with and without it; a word, whose tokens are compared with other
    tokens of the same texts; or a file of labelled texts. The examples are split into halves, texts never. Features are
    ranked on one half, with a p value that accounts for the search over all of them, and scored on the other, next to
    the best single neuron (see `sae.probing.concepts.find_concept`).

    Args:
        dictionary: a run, or its folder; or a dictionary, or its folder in any format that `sae.load` reads, with
            `model`. In a run folder, the activations are kept in `probing/`, so that the same examples are read once.
        having: texts with the concept, or a file of them: .csv, .jsonl or .parquet with a column `text`, or plain text
            whose paragraphs are the texts (its lines, if it has no empty ones).
        lacking: texts without it, or a file of them.
        word: a word, in the case in which it is written.
        texts: texts that have the word, or a file of them.
        data: a file of labelled texts, as for `sae.probe_run`; `settings.positive` names the label that is the concept.
        model: the language model that the dictionary was trained on; in a run, by default the run's.
        settings: number of examples, how a text is represented, shuffles, seed.
        progress: called with (stage, tokens done, tokens in total).

    Raises:
        ConfigError: the concept is shown in none of these ways or in several, the dictionary does not record its hook
            point, or it needs a model.
        DataError: a side has too few examples, a text is on both sides, the word is in none of the texts, or a file
            cannot be read.
        ModelError: the language model is not the dictionary's.
    """
    settings = settings or ConceptConfig()
    labelled, positive = _shown(having, lacking, word, texts, data, settings)
    subject, language_model, folder = _opened(dictionary, model, progress)
    facts = {
        "texts": fingerprint([labelled.texts, labelled.labels, labelled.spans]),
        **settings.of_examples().model_dump(mode="json", include={"examples", "max_tokens", "pool", "seed"}),
        "outside": settings.outside if data is not None else WITHOUT,
    }

    def examples(loaded: LanguageModel) -> Examples:
        chosen = settings.of_examples().model_copy(update={"outside": facts["outside"]})
        return choose_examples(labelled, loaded.tokenizer, subject.policy, loaded.bos, chosen)

    def read() -> ConceptSearch:
        activations = subject.activations(
            labelled.name, {"concept": facts}, examples, language_model, folder, within(progress, "activations"),
            texts=True,
        )  # fmt: skip
        return find_in_examples(
            subject.dictionary, activations, settings.model_copy(update={"positive": positive}), labelled.name
        )

    if folder is None:
        result = read()
    else:
        with locked(folder, "probing"):
            result = read()
    return replace(result, subject=subject.to_json())


def _shown(
    having: Texts | None, lacking: Texts | None, word: str | None, texts: Texts | None, data: str | Path | None,
    settings: ConceptConfig,
) -> tuple[LabelledTexts, str | None]:  # fmt: skip
    """The labelled texts, and the label of the concept, or None if it has to be found in the labels."""
    by_sides, by_word = having is not None or lacking is not None, word is not None or texts is not None
    if by_sides + by_word + (data is not None) != 1:
        raise ConfigError(f"{'several concepts' if by_sides or by_word else 'no concept'}: {_WAYS}")
    unread = [name for name in ("text", "label", "outside", "positive") if getattr(settings, name, None) is not None]
    if data is None and unread:
        raise ConfigError(f"{unread[0]}=…: read with DATA only, a file of labelled texts; leave it out")
    if by_sides:
        if having is None or lacking is None:
            missing = "with" if having is None else "without"
            raise ConfigError(f"no texts {missing} the concept: {_WAYS}")
        return contrast(having, lacking), WITH
    if by_word:
        if word is None or texts is None:
            raise ConfigError(f"a word needs texts, and texts need a word: {_WAYS}")
        return tokens_of_word(word, texts), WITH
    assert data is not None
    files = find_data([str(data)])
    if len(files) != 1:
        raise DataError(f"data {str(data)!r}: {len(files)} files; give one of them")
    read = files[0].read(settings.of_examples())
    if not read.spans:
        return read, concept_label(read.name, read.labels, settings.positive)
    return read, settings.positive


def _opened(
    place: Run | Dictionary | str | Path, model: LanguageModel | ModelConfig | str | Path | None, progress: Progress
) -> tuple[Subject, Callable[[], LanguageModel], Path | None]:
    """The dictionary, the function that loads its language model, and the folder where activations are kept."""
    if not isinstance(place, Run | Dictionary) and stands(expanded(place) / CONFIG_YAML):
        named = isinstance(model, str | Path)
        place = Run.open(place, (f"model.name={model}",) if named else (), progress)
        model = None if named else model
    if isinstance(place, Run):
        run = place
        subject = recorded_subject(run.dictionary("cpu"), run)
        load_model = (lambda: run.language_model) if model is None else _loader(model)
        return subject, load_model, run.folder / FOLDER
    dictionary = place if isinstance(place, Dictionary) else load(place)
    name = "dictionary" if isinstance(place, Dictionary) else f"dictionary {str(place)!r}"
    origin = dictionary.origin
    if origin.reads.hook is None:
        raise ConfigError(
            f"{name}: does not record the hook point that it reads; in Python, give it activations of your own: "
            "sae.probing.find_concept(dictionary, activations, labels)"
        )
    if model is None:
        recorded = origin.models.get("", {}).get("name")
        trained = f"; it was trained on {recorded!r}" if recorded else ""
        raise ConfigError(f"{name}: not a run folder, and needs its language model: --model NAME{trained}")
    language_model = _loader(model, origin.models.get("", {}).get("weight_processing"))()
    info = language_model.info
    check_belongs(origin, language_model.as_place, reads=origin.reads.hook)
    if isinstance(origin.tokens, dict):
        policy = TokenPolicy.from_json(origin.tokens)
    else:
        policy = language_model.token_policy(
            prepend_bos=language_model.bos is not None, masked_positions=1, mask_special_tokens=True
        )
    on_cpu = dictionary if dictionary.device.type == "cpu" else copy.deepcopy(dictionary).to("cpu")
    subject = Subject(on_cpu, origin.reads.hook, policy, info.to_json())
    return subject, lambda: language_model, None


def _loader(
    model: LanguageModel | ModelConfig | str | Path, processing: str | None = None
) -> Callable[[], LanguageModel]:  # fmt: skip
    """The function that loads a model; by its name, with the weights processed as the dictionary takes them."""
    if isinstance(model, LanguageModel):
        return lambda: model
    if isinstance(model, ModelConfig):
        return lambda: LanguageModel(model)
    return lambda: LanguageModel(
        ModelConfig.model_validate({"name": str(model), "weight_processing": processing or "none"})
    )
