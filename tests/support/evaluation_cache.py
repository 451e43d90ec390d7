"""A small activation cache written by hand: numbers, tokens and documents chosen by the test."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sae.activations.cache import ActivationCache, eligible_rows
from sae.activations.manifest import DOCUMENTS, MANIFEST, FileEntry, HookEntry, Manifest, shard_name
from sae.dictionary.base import Codes, Dictionary
from sae.dictionary.token_policy import TokenPolicy
from sae.files.writing import write_bytes
from sae.kernels.interface import Selection

HOOK = "blocks.1.hook_resid_pre"
POLICY = TokenPolicy(prepend_bos=True, masked_positions=1, masked_ids=(0,))


class Fixed(Dictionary):
    """f = x for the first d_sae numbers, and x̂ = whatever a test says: closed forms without an encoder."""

    architecture = "fixed"
    setting_names = ()

    def __init__(self, d_in: int, d_sae: int, reconstruct: Any, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(d_in, d_sae)
        self.reconstruct = reconstruct
        self.seen: Tensor | None = None
        self.requires_grad_(False).to(dtype)

    def settings(self) -> dict[str, Any]:
        return {}

    def select(self, x: Tensor) -> Selection:
        raise AssertionError("there is no encoder to select with")

    def lets_through(self, pre: Tensor) -> Tensor:
        raise AssertionError("there are no pre-activations")

    def encode_sparse(self, x: Tensor) -> Codes:
        self.seen = x
        indices = torch.arange(self.d_sae).expand(*x.shape[:-1], self.d_sae)
        return Codes(x[..., : self.d_sae].relu(), indices)

    def decode_sparse(self, codes: Codes) -> Tensor:
        assert self.seen is not None
        return self.reconstruct(self.seen)


def make_cache(
    folder: Path,
    held_out: tuple[Tensor, Tensor, Tensor],
    train: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    context_length: int = 8,
    shard_contexts: int = 3,
    policy: TokenPolicy = POLICY,
    model: dict[str, Any] | None = None,
) -> ActivationCache:
    """Write a complete float32 cache.

    Args:
        folder: where.
        held_out: activations `[rows, d_in]`, tokens `[rows]`, document indices `[rows]`.
        train: the same; None: as held out.
    """
    files: dict[str, FileEntry] = {}

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        rows = len(next(iter(tensors.values())))
        files[name] = FileEntry(rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    splits = {"train": train or held_out, "held_out": held_out}
    for split, (x, tokens, documents) in splits.items():
        size = shard_contexts * context_length
        for number, start in enumerate(range(0, len(x), size)):
            part = slice(start, start + size)
            ids = {"tokens": tokens[part].int(), "documents": documents[part].int()}
            write(shard_name("tokens", split, number), ids)
            write(shard_name(HOOK, split, number), {"activations": x[part].float()})
    names = {
        split: [f"{n}.txt" for n in range(int(documents.max()) + 1)] for split, (_, _, documents) in splits.items()
    }
    content = json.dumps(names).encode()
    (folder / DOCUMENTS).write_bytes(content)
    files[DOCUMENTS] = FileEntry(rows=0, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    x, tokens, _ = splits["train"]
    x = x[eligible_rows(tokens, policy, context_length)].double()
    total, squares = x.sum(0).tolist(), float(x.square().sum())
    manifest = Manifest(
        complete=True,
        model=model or {"name": "none", "weights_sha256": "0", "weight_processing": "none"},
        data={"source": "numbers"},
        tokens=policy.to_json(),
        context_length=context_length,
        shard_contexts=shard_contexts,
        dtype="float32",
        rows={split: len(tokens) for split, (_, tokens, _) in splits.items()},
        text_sha256="1" * 64,
        hooks={HOOK: HookEntry(d_in=x.shape[1], tokens=len(x), sum=total, sum_of_squares=squares)},
        files=files,
    )
    write_bytes(folder / MANIFEST, manifest.model_dump_json().encode())
    return ActivationCache(folder)


def random_rows(rows: int, d_in: int, documents: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations far from the origin, tokens of which some are masked, documents of unequal lengths in text order."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(documents, d_in, generator=generator)
    cuts = torch.randperm(rows - 1, generator=generator)[: documents - 1].sort().values + 1
    origin = torch.bucketize(torch.arange(rows), cuts, right=True)
    x = 5 + offsets[origin] + torch.randn(rows, d_in, generator=generator)
    tokens = torch.randint(0, 20, (rows,), generator=generator)
    return x, tokens, origin
