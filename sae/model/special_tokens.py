"""Finds special tokens that a tokenizer's class or settings make up and that are in none of its files.

Some tokenizer classes have a default BOS or EOS token and append it to the vocabulary if it is missing there. If the
embedding is padded, the model has a row with that id, which was never trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae.model.files import added_tokens


def made_up_tokens(tokenizer: Any, config: Any, read: Callable[[str], Path | None]) -> frozenset[int]:
    """Ids of BOS and EOS tokens that are neither in a file of the tokenizer nor in the model's configuration.

    Args:
        tokenizer: the Hugging Face tokenizer.
        config: the model's configuration.
        read: returns the path of a tokenizer file by its name, or None if there is no such file.
    """
    configured = {token for key in ("bos_token_id", "eos_token_id") for token in _ids(getattr(config, key, None))}
    ids = {token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None} - configured
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        ids -= set(backend.get_vocab(with_added_tokens=False).values())
    else:
        ids = {token for token in ids if token >= tokenizer.vocab_size}
    if not ids:
        return frozenset()
    added = added_tokens(read)
    return frozenset(token for token in ids if tokenizer.convert_ids_to_tokens(token) not in added)


def _ids(entry: Any) -> list[int]:
    return [] if entry is None else list(entry) if isinstance(entry, list | tuple) else [entry]
