"""Matryoshka BatchTopK: nested dictionaries, each of which reconstructs by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae.architectures.elementwise import OneThreshold
from sae.config.check import nested_sizes
from sae.config.settings import PREFIXES


class Matryoshka(OneThreshold):
    """f = z · [z > θ],  z = ReLU((x − b_dec) W_enc + b_enc),  x̂_m = f[:m] W_dec[:m] + b_dec,  x̂ = x̂_d_sae.

    Trained like BatchTopK, with the mean error of x̂_m over all prefixes m, so that general features come first.

    Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders".

    Args:
        prefixes: ascending shares of d_sae; the last is 1.
    """

    architecture = "matryoshka"
    saebench_name = "matryoshka_batch_topk"
    setting_names = ("k", "prefixes")
    reads = (*OneThreshold.reads, "dictionary.prefixes")

    prefix_ends: Int[Tensor, " prefixes"]

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int,
        prefixes: Sequence[float] = PREFIXES,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(d_in, d_sae, k=k, metadata=metadata)
        self.prefixes, self.prefix_sizes = tuple(prefixes), nested_sizes(prefixes, d_sae)
        self.register_buffer("prefix_ends", torch.tensor(self.prefix_sizes), persistent=False)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "prefixes": list(self.prefixes)}
