"""Activations of labelled examples at a dictionary's hook point: read once by its language model, kept in a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sae.config.progress import StageProgress
from sae.dictionary.base import Dictionary
from sae.dictionary.origin import check_belongs
from sae.dictionary.saved import identify
from sae.dictionary.token_policy import TokenPolicy
from sae.files.formats import as_read_back, fingerprint_of
from sae.model.language_model import LanguageModel
from sae.model.vocabulary import Vocabulary
from sae.probing.activations import LabelledActivations, load_activations, read_activations, save_activations
from sae.probing.contrasts import row_texts
from sae.probing.examples import Examples

FOLDER = "probing"
_MODEL_KEYS = ("weights_sha256", "weight_processing", "dtype", "tokenizer_sha256")
fingerprint = partial(fingerprint_of, ensure_ascii=False)


@dataclass(frozen=True)
class Subject:
    """A dictionary, and where it reads activations.

    Attributes:
        dictionary: on the CPU.
        hook: the hook point that it reads.
        policy: which tokens count.
        model: the language model's facts.
    """

    dictionary: Dictionary
    hook: str
    policy: TokenPolicy
    model: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What results are of."""
        return as_read_back({"dictionary": identify(self.dictionary), **self._reads()})

    def _reads(self) -> dict[str, Any]:
        """What determines its activations, apart from the text."""
        return {
            "model": {key: self.model.get(key) for key in ("name", *_MODEL_KEYS)},
            "hook": self.hook,
            "token_policy": self.policy.to_json(),
        }

    def activations(
        self,
        name: str,
        facts: Mapping[str, Any],
        examples: Callable[[LanguageModel], Examples],
        language_model: Callable[[], LanguageModel],
        folder: Path | None,
        progress: StageProgress,
        *,
        texts: bool = False,
    ) -> LabelledActivations:
        """Activations read by the language model, or kept from an earlier call.

        Args:
            name: name of the data set.
            facts: everything that determines the examples, apart from model, hook point and token policy.
            examples: chooses them.
            language_model: loads the model, if it is needed.
            folder: where activations are kept; None: they are not.
            progress: called with the number of tokens read.
            texts: keep the texts of the tokens too.

        Raises:
            ModelError: the language model is not the dictionary's.
        """
        reads = self._reads()
        key = fingerprint({**reads, "model": {**reads["model"], "name": None}, "examples": facts})
        stored = None if folder is None else load_activations(folder, name, key)
        if stored is not None:
            return stored
        model = language_model()
        place = replace(model.as_place, model_keys=_MODEL_KEYS)
        origin = replace(self.dictionary.origin, models={"": self.model})
        check_belongs(origin, place, reads=self.hook)
        chosen = examples(model)
        read = read_activations(model, self.hook, chosen, progress)
        if texts:
            read = replace(read, texts=row_texts(chosen, Vocabulary.of(model.tokenizer)))
        if folder is not None:
            save_activations(read, folder, name, key)
        return read
