"""A small activation cache and tokenizer made by hand: numbers whose codes are exact, text whose tokens are known."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from tests.support.fake_cache import Rows, write_fake_cache


class FakeTokenizer:
    """Byte-level: token 0 is special, token 1 + b is byte b, and a few longer ones follow."""

    all_special_ids = (0,)

    def __init__(self, *longer: str) -> None:
        from sae.model.vocabulary import _BYTE_OF

        of_byte = {byte: character for character, byte in _BYTE_OF.items()}
        self.names = {"<|end|>": 0} | {of_byte[byte]: 1 + byte for byte in range(256)}
        for text in longer:
            self.names["".join(of_byte[byte] for byte in text.encode())] = len(self.names)

    def get_vocab(self) -> dict[str, int]:
        return self.names


def make_cache(
    folder: Path, activations: Tensor, tokens: Tensor, documents: Tensor, context_length: int, shard_contexts: int = 4
) -> ActivationCache:
    """Write `[rows, d_in]` activations as the training split; the held-out split is one masked token."""
    nothing = torch.zeros(1)
    return write_fake_cache(
        folder,
        {
            "train": Rows(activations, tokens, documents),
            "held_out": Rows(torch.zeros(1, activations.shape[1]), nothing, nothing),
        },
        context_length=context_length,
        shard_contexts=shard_contexts,
        model={"name": "fake"},
        data={},
        document_names={
            "train": [f"text/{number}.txt" for number in range(int(documents.max()) + 1)],
            "held_out": ["other.txt"],
        },
    )


def eligible_rows(tokens: Tensor, context_length: int) -> Tensor:
    """Neither the first of a context nor token 0."""
    return (torch.arange(len(tokens)) % context_length != 0) & (tokens != 0)
