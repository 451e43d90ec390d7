"""Identity of a language model, as caches and dictionaries record it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelInfo:
    """Identity of a language model: two whose entries are equal, but for the names, give equal activations.

    Attributes:
        name: as the user gave it, or the file's or folder's name where that was a path.
        revision: git commit of a hub model.
        requested_revision: the revision asked for, which may be a branch or a tag.
        fingerprint: quick hash of a local model's files.
        weights_sha256: over all weights, as loaded and before any processing.
        weight_processing: what was done to them then.
        dtype: number type of the computation.
        tokenizer_sha256: over vocabulary and special tokens.
        trust_remote_code: whether code that comes with the model was allowed to run.
        code_sha256: over the code of its own that it was made of; None: the libraries' classes alone.
        config_sha256: over what its configuration says of the computation.
        tokenizer_ids_sha256: over the ids that the tokenizer gives for a text.
        library: what made the model of configuration and weights, and its version.
    """

    name: str
    revision: str | None
    requested_revision: str | None
    fingerprint: str | None
    weights_sha256: str
    weight_processing: str
    dtype: str
    tokenizer_sha256: str
    d_model: int
    n_layers: int
    max_context: int
    trust_remote_code: bool = False
    code_sha256: str | None = None
    config_sha256: str | None = None
    tokenizer_ids_sha256: str | None = None
    library: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
