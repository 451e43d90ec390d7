"""Activation caches written by hand: activations, tokens and documents are those that a test gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.manifest import DOCUMENTS, MANIFEST, FileEntry, HookEntry, Manifest, shard_name
from sae.dictionary.token_policy import TokenPolicy
from sae.files.writing import write_bytes

HOOK = "blocks.1.hook_resid_pre"
POLICY = TokenPolicy(prepend_bos=True, masked_positions=1, masked_ids=(0,))


class Rows(NamedTuple):
    """A split: activations `[rows, d_in]` as stored, tokens `[rows]`, document numbers `[rows]`, scale if int8."""

    activations: Tensor
    tokens: Tensor
    documents: Tensor
    scale: Tensor | None = None


def write_fake_cache(
    folder: Path,
    splits: Mapping[str, Rows],
    *,
    hook: str = HOOK,
    context_length: int = 8,
    shard_contexts: int = 3,
    policy: TokenPolicy = POLICY,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    document_names: Mapping[str, list[str]] | None = None,
) -> ActivationCache:
    """Write a complete cache.

    Args:
        folder: where.
        splits: `train`, and `held_out` if there is one.
        document_names: by split; None: `0.txt`, `1.txt`, …
    """
    files: dict[str, FileEntry] = {}

    def write(name: str, content: bytes, rows: int) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        files[name] = FileEntry(rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def write_shard(name: str, **tensors: Tensor) -> None:
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write(name, content, len(next(iter(tensors.values()))))

    shard_rows = shard_contexts * context_length
    for split, (x, tokens, documents, scale) in splits.items():
        for number, start in enumerate(range(0, len(x), shard_rows)):
            part = slice(start, start + shard_rows)
            scales = {} if scale is None else {"scale": scale[part]}
            write_shard(shard_name("tokens", split, number), tokens=tokens[part].int(), documents=documents[part].int())
            write_shard(shard_name(hook, split, number), activations=x[part], **scales)
    names = {split: [f"{n}.txt" for n in range(int(rows.documents.max()) + 1)] for split, rows in splits.items()}
    write(DOCUMENTS, json.dumps({"held_out": [], **names, **(document_names or {})}).encode(), 0)
    manifest = Manifest(
        complete=True,
        model={"name": "none", "weights_sha256": "0", "weight_processing": "none"} if model is None else dict(model),
        data={"source": "numbers"} if data is None else dict(data),
        tokens=policy.to_json(),
        context_length=context_length,
        shard_contexts=shard_contexts,
        dtype=str(splits["train"].activations.dtype).removeprefix("torch."),
        rows={"held_out": 0, **{split: len(rows.tokens) for split, rows in splits.items()}},
        text_sha256="1" * 64,
        hooks={hook: _hook_entry(splits["train"], policy, context_length)},
        files=files,
    )
    write_bytes(folder / MANIFEST, manifest.model_dump_json().encode())
    return ActivationCache(folder)


def _hook_entry(train: Rows, policy: TokenPolicy, context_length: int) -> HookEntry:
    x = train.activations if train.scale is None else train.activations.float() * train.scale[:, None]
    keep = ~torch.isin(train.tokens, torch.tensor(policy.masked_ids))
    keep &= torch.arange(len(train.tokens)) % context_length >= policy.masked_positions
    x = x[keep].double()
    squares = float(x.square().sum())
    return HookEntry(d_in=x.shape[1], tokens=len(x), sum=x.sum(0).tolist(), sum_of_squares=squares)
