"""Activations, tokens and documents for evaluation, a cache of them, and a dictionary with given reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.dictionary.base import Dictionary
from sae.dictionary.codes import Codes
from sae.kernels.interface import Selection
from tests.support.fake_cache import Rows, write_fake_cache


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

    def decode_sparse(self, codes: Codes, like: Tensor | None = None) -> Tensor:
        assert self.seen is not None
        return self.reconstruct(self.seen)


def make_cache(
    folder: Path,
    held_out: tuple[Tensor, Tensor, Tensor],
    train: tuple[Tensor, Tensor, Tensor] | None = None,
    **options: Any,
) -> ActivationCache:
    """Write a complete float32 cache.

    Args:
        folder: where.
        held_out: activations `[rows, d_in]`, tokens `[rows]`, document indices `[rows]`.
        train: the same; None: as held out.
        options: those of `write_fake_cache`.
    """
    splits = {"train": train or held_out, "held_out": held_out}
    return write_fake_cache(
        folder,
        {split: Rows(x.float(), tokens, documents) for split, (x, tokens, documents) in splits.items()},
        **options,
    )


def random_rows(rows: int, d_in: int, documents: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Activations far from the origin, tokens of which some are masked, documents of unequal lengths in text order."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randn(documents, d_in, generator=generator)
    cuts = torch.randperm(rows - 1, generator=generator)[: documents - 1].sort().values + 1
    origin = torch.bucketize(torch.arange(rows), cuts, right=True)
    x = 5 + offsets[origin] + torch.randn(rows, d_in, generator=generator)
    tokens = torch.randint(0, 20, (rows,), generator=generator)
    return x, tokens, origin
