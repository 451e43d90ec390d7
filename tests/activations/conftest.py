"""A cache of given numbers, written without a language model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from sae.activations import ActivationCache
from sae.activations.manifest import DOCUMENTS, MANIFEST, FileEntry, HookEntry, Manifest, shard_name
from sae.files.writing import write_bytes

WriteCache = Callable[..., ActivationCache]


def write_synthetic_cache(
    folder: Path,
    activations: Tensor,
    tokens: Tensor,
    *,
    scale: Tensor | None = None,
    context_length: int = 8,
    shard_contexts: int = 4,
    masked_ids: tuple[int, ...] = (0,),
    masked_positions: int = 1,
) -> ActivationCache:
    """`activations [rows, d_in]` of the training split at the hook `blocks.0.hook_resid_pre`."""
    shard_rows = context_length * shard_contexts
    files = {}

    def write(name: str, content: bytes, rows: int) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        files[name] = FileEntry(rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    hook = "blocks.0.hook_resid_pre"
    for number, first in enumerate(range(0, len(tokens), shard_rows)):
        part = slice(first, min(first + shard_rows, len(tokens)))
        ids = tokens[part].int()
        stored = {"activations": activations[part].clone()} | ({} if scale is None else {"scale": scale[part].clone()})
        write(
            shard_name("tokens", "train", number), save({"tokens": ids, "documents": torch.zeros_like(ids)}), len(ids)
        )
        write(shard_name(hook, "train", number), save(stored), len(ids))
    write(DOCUMENTS, b'{"train": ["a"], "held_out": []}', 1)
    manifest = Manifest(
        complete=True,
        model={"name": "synthetic"},
        data={},
        tokens={"prepend_bos": True, "masked_positions": masked_positions, "masked_ids": list(masked_ids)},
        context_length=context_length,
        shard_contexts=shard_contexts,
        dtype=str(activations.dtype).removeprefix("torch."),
        rows={"train": len(tokens), "held_out": 0},
        text_sha256="",
        hooks={hook: HookEntry(d_in=activations.shape[1])},
        files=files,
    )
    write_bytes(folder / MANIFEST, manifest.model_dump_json().encode())
    return ActivationCache(folder)


@pytest.fixture
def write_cache(tmp_path: Path) -> WriteCache:
    """Writes a synthetic cache into this test's folder."""
    return lambda *args, **options: write_synthetic_cache(tmp_path / "synthetic", *args, **options)
