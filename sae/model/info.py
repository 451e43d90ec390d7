"""Identity of a language model, as recorded in caches and dictionaries."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sae.model.native import NativeModel

_LENGTHS = (
    "n_positions", "max_position_embeddings", "max_context_length", "max_length", "seq_length", "max_seq_len",
    "max_sequence_length",
)  # fmt: skip
"""Names of the number of tokens that a model reads, in the order in which transformer-lens looks for them."""
_NO_LIMIT = 2048
"""What transformer-lens takes for models that do not state it."""


@dataclass(frozen=True)
class ModelInfo:
    """Identity of a language model. Models whose entries other than the name are equal give equal activations.

    Attributes:
        name: as given by the user; for a path, the name of the file or folder.
        revision: git commit of a hub model.
        requested_revision: the requested revision, which may be a branch or a tag.
        fingerprint: quick hash of a local model's files.
        weights_sha256: hash of all weights, as loaded and before any processing.
        weight_processing: how the weights were processed after loading.
        dtype: number type of the computation.
        tokenizer_sha256: hash of vocabulary and special tokens.
        trust_remote_code: whether code that comes with the model was allowed to run.
        code_sha256: hash of the model's own code that was used; None if only the libraries' classes were.
        config_sha256: hash of the parts of its configuration that affect the computation.
        tokenizer_ids_sha256: hash of the ids that the tokenizer gives for a text.
        library: the library that built the model, and its version.
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


def model_shape(bridge: Any, native: NativeModel | None, config: Any) -> tuple[int, int, int]:
    """Width of the residual stream, number of blocks, and number of tokens that a model reads.

    Args:
        bridge: transformer-lens's bridge; None if it is not installed.
        native: the model as transformers runs it; needed without a bridge.
        config: the Hugging Face configuration.
    """
    if bridge is not None:
        return bridge.cfg.d_model, bridge.cfg.n_layers, bridge.cfg.n_ctx
    assert native is not None
    lengths = (getattr(config, name, None) for name in _LENGTHS)
    return native.width, len(native.blocks), next((length for length in lengths if length), _NO_LIMIT)
