"""Names and meanings of a feature store's files and columns, shared by writer and reader."""

from __future__ import annotations

from sae.files.formats import Format
from sae.files.kept import KeptResult

INDEX = "features.json"
COLUMNS = "features.safetensors"
TOKENS = "tokens.safetensors"
DOCUMENTS = "documents.json"
VOCABULARY = "vocabulary.json"
STORE = KeptResult(Format("sae-features", 1), INDEX, of_version=False)

MEANINGS = {
    COLUMNS: {
        "count": "tokens on which the feature fired",
        "mean": "mean of its non-zero activations",
        "max": "largest activation",
        "histogram": "non-zero activations between each two histogram_edges; the outer bins also hold all beyond",
        "example_start": "feature j has the examples example_start[j] to example_start[j + 1]",
        "example_group": "0: strongest of all, one per document; 1: random, of the strongest quantile; 2: of the next",
        "example_row": "the token that fired: a row of tokens",
        "example_value": "its activation",
        "window_count": "tokens of the example's window with a non-zero activation",
        "window_offset": "its place in the window, settings.before being that of the example's own token",
        "window_value": "activation there",
        "promoted": "token ids the feature raises most in the next-token logits",
        "promoted_logits": "by how much per unit of activation, up to a positive factor",
        "suppressed": "token ids it lowers most",
        "suppressed_logits": "by how much",
        "neighbour": "features with the most similar decoder directions",
        "neighbour_cosine": "cosine between the directions",
    },
    TOKENS: {
        "tokens": "token ids of the scanned text, one a row; row r belongs to context r // context_length",
        "document_start": "first row of each run of rows of one document",
        "document": "that document, an index into documents.json",
    },
}

OF_EXAMPLES = ("example_", "window_")
"""Prefixes of the columns with an entry per example, or per token of its window, instead of per feature."""
