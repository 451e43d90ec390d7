"""A small activation cache and tokenizer made by hand: numbers whose codes are exact, text whose tokens are known."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.manifest import DOCUMENTS, MANIFEST, FileEntry, HookEntry, Manifest, shard_name
from sae.dictionary.token_policy import TokenPolicy
from sae.files.writing import write_bytes

HOOK = "blocks.1.hook_resid_pre"
POLICY = TokenPolicy(prepend_bos=True, masked_positions=1, masked_ids=(0,))


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
    files: dict[str, FileEntry] = {}

    def write(name: str, rows: int, **tensors: Tensor) -> None:
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        files[name] = FileEntry(rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    size = shard_contexts * context_length
    splits = {
        "train": (activations, tokens.int(), documents.int()),
        "held_out": (torch.zeros(1, activations.shape[1]), torch.zeros(1).int(), torch.zeros(1).int()),
    }
    for split, (x, ids, origin) in splits.items():
        for number, start in enumerate(range(0, len(ids), size)):
            part = slice(start, start + size)
            rows = len(ids[part])
            write(shard_name("tokens", split, number), rows, tokens=ids[part], documents=origin[part])
            write(shard_name(HOOK, split, number), rows, activations=x[part])
    names = {"train": [f"text/{number}.txt" for number in range(int(documents.max()) + 1)], "held_out": ["other.txt"]}
    content = json.dumps(names).encode()
    (folder / DOCUMENTS).write_bytes(content)
    files[DOCUMENTS] = FileEntry(rows=0, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    eligible = activations[eligible_rows(tokens, context_length)].double()
    manifest = Manifest(
        complete=True,
        model={"name": "fake"},
        data={},
        tokens=POLICY.to_json(),
        context_length=context_length,
        shard_contexts=shard_contexts,
        dtype="float32",
        rows={"train": len(tokens), "held_out": 1},
        text_sha256="0" * 64,
        hooks={
            HOOK: HookEntry(
                d_in=activations.shape[1],
                tokens=len(eligible),
                sum=eligible.sum(0).tolist(),
                sum_of_squares=float(eligible.square().sum()),
            )
        },
        files=files,
    )
    write_bytes(folder / MANIFEST, manifest.model_dump_json().encode())
    return ActivationCache(folder)


def eligible_rows(tokens: Tensor, context_length: int) -> Tensor:
    """Neither the first of a context nor token 0."""
    return (torch.arange(len(tokens)) % context_length != 0) & (tokens != 0)
