"""The groups that give at most one top example per feature: documents, or sections if there are few documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from sae.activations.cache import ActivationCache, ContextBatch
from sae.config.settings import FeaturesConfig
from sae.config.splits import TRAIN

SECTION_TOKENS = 2048
"""Section length if the text was not cut into sections: about the 10,000 characters of `data.section_characters`."""


@dataclass(frozen=True)
class ExampleGroups:
    """Numbers documents or sections.

    Sections are used if there are fewer than twice as many documents as examples to keep. One example per document
    would then show every feature in the same few texts, or leave places empty.

    Attributes:
        unit: the unit that is numbered.
        documents: number of documents, if they are few.
        stretch: rows per section if the cache has no sections.
    """

    unit: Literal["document", "section"]
    documents: int
    stretch: int

    @staticmethod
    def of(cache: ActivationCache, settings: FeaturesConfig, split: str = TRAIN) -> ExampleGroups:
        """The groups for the scanned part of a split."""
        left, documents, enough = settings.tokens or cache.rows(split), 0, 2 * settings.top
        for number in range(cache.shards(split)):
            part = cache.token_columns(split, number)["documents"][:left]
            documents, left = max(documents, int(part.max()) + 1), left - len(part)
            if documents >= enough or left <= 0:
                break
        contexts = max(1, SECTION_TOKENS // cache.context_length)
        return ExampleGroups(
            "document" if documents >= enough else "section", documents, contexts * cache.context_length
        )

    def number(self, batch: ContextBatch) -> Int[np.ndarray, " rows"]:
        """The group number of each row of a batch."""
        documents = batch.documents.flatten().numpy()
        if self.unit == "document":
            return documents
        if batch.sections is not None:
            return batch.sections.flatten().numpy()
        rows = batch.first_row + np.arange(len(documents))
        return rows // self.stretch * self.documents + documents
