"""What gives at most one of a feature's strongest examples: a document, or a section where documents are few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from sae.activations.cache import ActivationCache, ContextBatch
from sae.config.settings import FeaturesConfig
from sae.config.splits import TRAIN

SECTION_TOKENS = 2048
"""Of a section where documents were not cut into any: about the 10,000 characters of `data.section_characters`."""


@dataclass(frozen=True)
class ExampleGroups:
    """Numbers for documents or sections.

    With fewer than twice as many documents as examples are kept, one a document would show every feature in the same
    few texts, or leave places empty: sections take their part.

    Attributes:
        unit: what has a number.
        documents: how many there are, if they are few.
        stretch: rows of a section where the cache knows none.
    """

    unit: Literal["document", "section"]
    documents: int
    stretch: int

    @staticmethod
    def of(cache: ActivationCache, settings: FeaturesConfig) -> ExampleGroups:
        """Those for the part of the cache that is scanned."""
        left, documents, enough = settings.tokens or cache.rows(TRAIN), 0, 2 * settings.top
        for number in range(cache.shards(TRAIN)):
            part = cache.token_columns(TRAIN, number)["documents"][:left]
            documents, left = max(documents, int(part.max()) + 1), left - len(part)
            if documents >= enough or left <= 0:
                break
        contexts = max(1, SECTION_TOKENS // cache.context_length)
        return ExampleGroups(
            "document" if documents >= enough else "section", documents, contexts * cache.context_length
        )

    def number(self, batch: ContextBatch) -> Int[np.ndarray, " rows"]:
        """The number of every row of a batch."""
        documents = batch.documents.flatten().numpy()
        if self.unit == "document":
            return documents
        if batch.sections is not None:
            return batch.sections.flatten().numpy()
        rows = batch.first_row + np.arange(len(documents))
        return rows // self.stretch * self.documents + documents
